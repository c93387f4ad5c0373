"""What `generate` imports: seconds that every command would wait."""

import subprocess
import sys


def test_generating_imports_no_compiler():
    """torch._dynamo takes a second to import, and much in PyTorch does so by the way."""
    script = (
        "import sys; from quasar import generate, load; "
        "generate(load(device='cpu'), [5, 6], max_new_tokens=8).result(); "
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'triton') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "[]"
