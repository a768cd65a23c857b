"""Load a vision-language model and its processor; name its parts; the vision tower of the demo's base."""
