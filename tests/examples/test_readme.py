"""The README's two pieces of code give the same loss and gradients, and its map is the tree."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_code_today_and_with_synpo_agree():
    results = []
    for block in python_blocks(ROOT / "README.md"):
        torch.manual_seed(0)
        lm_head = torch.nn.Linear(16, 50, bias=False).double()
        hidden = torch.randn(4, 6, 16, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(50, (4, 6))
        labels[0, 3:], labels[3, :2] = -100, -100
        names = {"lm_head": lm_head, "hidden": hidden, "labels": labels}
        exec(block.replace(".float()", ""), names)  # the cast to float32 is for half precision
        loss = names["output"].loss if "output" in names else names["loss"]
        results.append((loss.detach(), hidden.grad, lm_head.weight.grad))
    today, with_synpo = results
    for one, other in zip(today, with_synpo, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_the_map_of_the_readme_is_the_tree():
    folder, listed = "", set()
    for line in re.search(r"## Map\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1].splitlines():
        for name in re.match(r" *((?:[\w.]+\.py|\w+/)(?: [\w.]+\.py)*)", line)[1].split():
            folder = name if not line.startswith(" ") else folder
            listed.add(folder if folder == name else folder + name)
    assert all((ROOT / path).exists() for path in listed)
    for package in ("synpo", "synpo_kernels"):
        found = {f"{package}/{p.name}" for p in (ROOT / package).glob("[a-z]*.py")}
        assert found <= listed, found - listed
