"""Load a vision-language model and its processor; name its parts."""
