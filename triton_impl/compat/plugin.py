"""Installed = switched: what vLLM and SGLang find at the entry points `vllm.general_plugins` and `sglang.srt.plugins`.

Both engines call every plugin they find, in each of their processes. Nothing happens unless the variable
TWINCONV_ENGINES names the engine: `TWINCONV_ENGINES=vllm,sglang`.
"""

import os

from triton_impl.compat.install import install

VARIABLE = "TWINCONV_ENGINES"
ENGINES = ("vllm", "sglang")


def vllm():
    """Installs the adapter into vLLM if TWINCONV_ENGINES says so; raises as `install`, and ValueError on unknown names."""
    _switch("vllm")


def sglang():
    """As `vllm`, for SGLang."""
    _switch("sglang")


def _switch(engine):
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    unknown = [name for name in named if name not in ENGINES]
    if unknown:
        raise ValueError(
            f"{VARIABLE}: expected names among {ENGINES}, separated by commas, got {unknown[0]!r}"
        )
    if engine in named:
        install(engine)
