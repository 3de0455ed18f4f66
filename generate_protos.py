"""Generate the Python modules of the contract: ``protos/mxgpt/v1/*.proto`` to ``mxgpt/v1/``."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc


def generate(root: Path) -> None:
    """Write ``mxgpt/v1/*_pb2.py``, their stubs and ``*_pb2_grpc.py`` below `root`.

    Raises:
        RuntimeError: when protoc refuses a file.
    """
    protos = root / "protos"
    well_known = Path(str(files("grpc_tools"))) / "_proto"
    arguments = [
        "protoc",
        f"-I{protos}",
        f"-I{well_known}",
        f"--python_out={root}",
        f"--pyi_out={root}",
        f"--grpc_python_out={root}",
        *sorted(str(path) for path in protos.rglob("*.proto")),
    ]
    package = root / "mxgpt" / "v1"
    package.mkdir(parents=True, exist_ok=True)
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc failed on {protos}")
    (package / "__init__.py").write_text('"""Generated from protos/mxgpt/v1. Do not edit."""\n')


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
