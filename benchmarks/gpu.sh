#!/bin/sh
# Everything that needs one large GPU, in at most 8 minutes; --help says what, --tiny runs it on a CPU.
#
#     benchmarks/gpu.sh --data DIR        # DIR holds cifar10n.npz
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
lacks=$("$python" - <<'END'
from importlib.util import find_spec

needed = ("torch", "lightning", "captum", "torchmetrics", "torchvision", "sklearn", "pytest", "pytest_timeout")
print(*(name for name in needed if find_spec(name) is None))
END
)
if [ -n "$lacks" ]; then
    echo "Missing for $python: $lacks. Install the package with its extras all and dev, or set PYTHON." >&2
    exit 1
fi
exec "$python" -m benchmarks.gpu "$@"
