"""`python -m megatron_offgrpo.cli`."""

from megatron_offgrpo.cli import main

main()
