"""The passes of docs/writing-a-pass.md, each in full. They use public names of sdgraph only, as yours would."""
