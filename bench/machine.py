"""What a page of results says of the machine."""

import platform
import re
from pathlib import Path


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    told = {key: re.search(rf"^{key}\s*: (.+)", text, re.MULTILINE) for key in ("model name", "cpu family", "model")}
    name, family, model = (found[1] if found else "" for found in told.values())
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{flag}\b", text)]
    return f"{name or platform.processor()} (family {family}, model {model}; {', '.join(flags)})"
