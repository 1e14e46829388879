#!/usr/bin/env bash
# lightly's SwaVPrototypes are no cosines: each prototype has a bias that is trained.
#
# SwAV scores an embedding by its cosine with each prototype, and the published code's
# layer of prototypes has no bias. In lightly 1.6.0 `normalize()` brings the weights to
# unit length, but the layers have a bias beside them: an embedding of zeros has scores
# other than 0, scores leave [-1, 1], and the bias, which nothing normalizes, moves with
# training. (lightly's first version of this layer, in its pull request 502, had none.)
#
# Seen with lightly 1.6.0, torch 2.14.1, Python 3.11:
#   parameters: heads.0.weight heads.0.bias
#   score of an embedding of zeros: 0.087
#   after ten steps of SGD: 4.96
#
# Usage: findings/lightly_swav_prototypes.sh [PYTHON]; it needs about 6 GB of disk.
set -euo pipefail
python=${1:-python3.11}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install -q lightly==1.6.0 torch==2.14.1 torchvision==0.29.1
cat > "$work/check.py" <<'PYTHON'
import torch
from lightly.models.modules import SwaVPrototypes

torch.manual_seed(0)
prototypes = SwaVPrototypes(128, 100)
names = [name for name, _ in prototypes.named_parameters()]
print("parameters:", *names)


def score_of_zeros():
    with torch.no_grad():
        prototypes.normalize()
        return prototypes(torch.zeros(1, 128)).abs().max().item()


before = score_of_zeros()
print(f"score of an embedding of zeros: {before:.3f}")
optimizer = torch.optim.SGD(prototypes.parameters(), lr=0.5)
embeddings = torch.nn.functional.normalize(torch.randn(64, 128), dim=1)
for _ in range(10):
    loss = torch.nn.functional.cross_entropy(
        prototypes(embeddings) / 0.1, torch.zeros(64, dtype=torch.long)
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
after = score_of_zeros()
print(f"after ten steps of SGD: {after:.2f}")
expected = names == ["heads.0.weight", "heads.0.bias"] and before > 0.05 < after
raise SystemExit(0 if expected and after > before else "the behavior has changed")
PYTHON
"$work/venv/bin/python" "$work/check.py"
