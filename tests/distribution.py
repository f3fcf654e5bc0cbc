"""`python -m tests.distribution FOLDER`: the built sdist and wheel hold what they should, and the wheel works alone."""

import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import jaxsoftmax

ROOT = Path(__file__).parents[1]
VERSION = jaxsoftmax.__version__
CHECK = "import sys, jaxsoftmax as js; assert js.__file__.startswith(sys.prefix); print(js.softmax([1.0, 1.0]))"


def check(folder: Path) -> None:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    assert wheel.name == f"jaxsoftmax-{VERSION}-py3-none-any.whl", wheel
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("jaxsoftmax/**/*.py")}
    info = f"jaxsoftmax-{VERSION}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == modules | {"jaxsoftmax/py.typed"}
    assert f"{info}licenses/LICENSE" in names
    readme = archive.read(f"{info}METADATA").decode()
    assert "# jaxsoftmax\n" in readme and not re.search(r"\]\((?!https?:)", readme), "a relative link in the metadata"
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "pyproject.toml", "conftest.py", *modules}
    assert wanted <= inside, wanted - inside
    assert not [name for name in inside if name.startswith(("docs/_build", "docs/api/", "out/"))]
    with tempfile.TemporaryDirectory() as fresh:  # outside the checkout, so that only the wheel can be imported
        venv.create(fresh, with_pip=True)
        python = f"{fresh}/bin/python"
        subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True)
        subprocess.run([python, "-I", "-W", "error", "-c", CHECK], check=True)
    print(f"{wheel.name}: {len(names)} files; {sdist.name}: {len(inside)} files; the wheel works alone")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
