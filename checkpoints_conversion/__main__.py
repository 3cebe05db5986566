"""`python -m checkpoints_conversion`."""

from checkpoints_conversion.cli import main

if __name__ == "__main__":
    main()
