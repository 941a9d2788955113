"""A small world of drawn scenes, and a Stable Diffusion trained on it: README.md says what is here."""
