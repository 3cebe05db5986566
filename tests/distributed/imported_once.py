"""What the ranks of all tests import, before they are forked."""

from megatron_offgrpo.parallel import portable  # noqa: F401  # isort: skip

import gc

import transformers  # noqa: F401

from megatron_offgrpo.training import loop  # noqa: F401

gc.collect()
gc.freeze()  # as in tests/conftest.py
