"""Plans that are found by measuring on prompts: `search`, and `fit_forecast` for the dampings of one plan.

The package is not called `search`, because a submodule of that name would replace the function `sdgraph.search`. It
imports `runtime` and the layers below; it trains nothing.
"""

PLAN_FORMAT = 1  # of the plans that `SearchResult.as_dict` returns and the command line reads
TIMES_FORMAT = 1  # of the times of calls that `sdgraph bench --out` writes and a search reads
