"""``python -m lorasculpt``; for several GPUs ``accelerate launch -m lorasculpt train run.yaml``."""

from .cli import main

if __name__ == "__main__":
    main()
