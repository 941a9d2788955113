"""The passes of docs/writing-a-pass.md in full. They use public names of sdgraph only, as your passes would."""
