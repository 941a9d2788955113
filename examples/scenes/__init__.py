"""A small world of drawn scenes, and a Stable Diffusion that was trained on it; see README.md."""
