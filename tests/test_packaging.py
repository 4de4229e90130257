"""What is built and shipped: the extension's ABI, the fallback without a compiler, the source distribution."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import build_backend
import kafops

ROOT = Path(__file__).parent.parent
CSRC = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file())


def setup(*arguments, **environment):
    """Run setup.py; an environment variable that is None is unset."""
    merged = {k: v for k, v in (os.environ | environment).items() if v is not None}
    return subprocess.run(
        [sys.executable, "setup.py", *map(str, arguments)], cwd=ROOT, env=merged, capture_output=True, text=True
    )


def command(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


MODULES = {"_C": kafops.backends.cpu, "_C_cuda": kafops.backends.cuda}
KAFOPS = Path(kafops.__file__).parent


@pytest.fixture(scope="module", params=MODULES)
def extension(request):
    """Each compiled module: the file, which need not be one that this torch can load."""
    found = KAFOPS / f"{request.param}.abi3.so"
    if not found.exists():
        pytest.skip(f"{request.param} was not built here: {MODULES[request.param].load_error}")
    return found


def undefined_symbols(extension):
    nm = [command("nm"), "--dynamic", "--undefined-only", extension]
    output = subprocess.run(nm, check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in output.splitlines()}


def test_extension_is_small(extension):
    """Also for six GPU architectures."""
    assert extension.stat().st_size < (4e6 if extension.name == "_C.abi3.so" else 30e6)


def test_cuda_module_is_not_needed_by_the_cpu_module(extension):
    """So that one wheel serves a torch with CUDA and one without."""
    dynamic = subprocess.run([command("readelf"), "-d", extension], check=True, capture_output=True, text=True).stdout
    assert ("libtorch_cuda.so" in dynamic) is (extension.name == "_C_cuda.abi3.so")


def test_extension_uses_only_the_stable_c_interface_of_torch(extension):
    symbols = undefined_symbols(extension)
    assert any(s.startswith("aoti_torch_") for s in symbols)
    # Itanium-mangled names of the namespaces at, c10, caffe2 and torch.
    unstable = {s for s in symbols if re.match(r"_Z\w*?(2at|3c10|6caffe2|5torch)[A-Z0-9]", s)}
    assert not unstable


def test_extension_uses_no_private_names_of_python(extension):
    assert not {s for s in undefined_symbols(extension) if s.startswith("_Py")}


def test_extension_has_no_debug_information(extension):
    sections = subprocess.run([command("readelf"), "-SW", extension], check=True, capture_output=True, text=True).stdout
    assert ".text" in sections
    assert ".debug" not in sections


def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path):
    done = setup("--version", PATH=str(tmp_path), CXX=None, KAFOPS_BUILD_CPU=None, KAFOPS_BUILD_CUDA=None)
    assert done.returncode == 0
    assert "WITHOUT compiled CPU kernels: no C++ compiler was found" in done.stderr
    assert "WITHOUT compiled CUDA kernels: no C++ compiler was found" in done.stderr


def test_kernels_that_are_asked_for_but_cannot_be_built_are_an_error(tmp_path):
    done = setup("--version", PATH=str(tmp_path), CXX=None, KAFOPS_BUILD_CPU="1")
    assert done.returncode != 0
    assert "KAFOPS_BUILD_CPU=1, but no C++ compiler was found" in done.stderr


def test_kernels_that_are_not_asked_for_are_left_out():
    done = setup("--version", KAFOPS_BUILD_CPU="0", KAFOPS_BUILD_CUDA="0")
    assert done.returncode == 0
    for which in ("CPU", "CUDA"):
        assert f"WITHOUT compiled {which} kernels: KAFOPS_BUILD_{which}=0" in done.stderr


def test_a_compiler_that_fails_is_an_error(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no licence' >&2\nexit 1\n")
    compiler.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    done = setup("build_ext", *folders, PATH=path, CXX=None, KAFOPS_BUILD_CPU=None, KAFOPS_BUILD_CUDA="0")
    assert done.returncode != 0
    assert "WITHOUT compiled CPU" not in done.stderr


def test_without_kernels_the_package_warns_once_and_computes(tmp_path):
    folders = ("--build-base", tmp_path / "base", "--build-lib", tmp_path / "lib")
    done = setup("build", *folders, KAFOPS_BUILD_CPU="0", KAFOPS_BUILD_CUDA="0")
    assert done.returncode == 0
    assert not list(tmp_path.rglob("*.so"))
    # An editable installation would find the kernels of the working tree.
    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import warnings, torch, kafops
x, layer = torch.randn(2, 3, requires_grad=True), kafops.KAF1d(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer(x), layer(x).sum().backward()
assert len(caught) == 1, caught
expected = kafops.reference.kaf(x, layer.alpha, layer.gamma, 3.0)
assert torch.equal(layer(x), expected)
print(kafops.__file__, caught[0].message)
with warnings.catch_warnings(record=True) as caught:  # operators called directly, as exported programs do
    warnings.simplefilter("always")
    y = torch.ops.kafops.kaf(x, layer.alpha, layer.gamma, None, 3.0)
    (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    found = y, g, *torch.autograd.grad(g.sin().sum(), (x, layer.alpha))
assert ["an operator in plain PyTorch" in str(w.message) for w in caught] == [True], caught
y = kafops.reference.kaf(x, layer.alpha, layer.gamma, 3.0)
(g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
want = (y, g, *torch.autograd.grad(g.sin().sum(), (x, layer.alpha)))
torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)  # |alpha| is 42
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path))
    assert "plain PyTorch reference" in run.stdout
    assert "without compiled kernels" in run.stdout


def test_source_distribution_holds_all_sources(tmp_path):
    folders = ("egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    done = setup(*folders, KAFOPS_BUILD_CPU="0", KAFOPS_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("kafops-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    package = {
        f"kafops/{name}" for name in ("py.typed", "schemas.inc", "backends/cpu.py", "backends/triton/kernels.py")
    }
    assert {*CSRC, *package, "setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not {name for name in names if name.endswith((".so", ".o")) or name.startswith(("tests/", "runs/"))}


def test_what_a_wheel_lacks_stands_in_its_name(tmp_path):
    """pip shows the name, and nothing else of a build that succeeds."""
    folders = ("build", "--build-base", tmp_path / "base", "egg_info", "--egg-base", tmp_path)
    wheel = ("bdist_wheel", "--dist-dir", tmp_path / "dist", "--bdist-dir", tmp_path / "bdist")
    done = setup(*folders, *wheel, KAFOPS_BUILD_CPU="0", KAFOPS_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "dist").iterdir()
    assert made.name == f"kafops-{kafops.__version__}-0_without_kernels-py3-none-any.whl"


def test_the_description_has_no_links_that_lead_nowhere():
    done = setup("--long-description", KAFOPS_BUILD_CPU="0", KAFOPS_BUILD_CUDA="0")
    assert done.stdout.startswith("# kafops\n")
    links = re.findall(r"\]\(([^)]*)\)", done.stdout)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert "$$" not in done.stdout


def test_the_torch_that_is_installed_is_built_with(tmp_path, monkeypatch):
    assert build_backend.get_requires_for_build_wheel() == ["ninja"]
    assert Path(build_backend.installed(), "torch").is_dir()
    monkeypatch.setattr(build_backend.sysconfig, "get_path", lambda kind, vars: str(tmp_path / vars.get("base", "own")))
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setenv("VIRTUAL_ENV", "active")
    assert build_backend.get_requires_for_build_wheel() == ["ninja", "torch>=2.10"]
    for folder, version in (("own", "2.9.1"), ("active", "2.10.0+cpu")):  # one that is too old, and one that will do
        info = tmp_path / folder / f"torch-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    assert build_backend.installed() == str(tmp_path / "active")
    monkeypatch.setattr(sys, "path", [*sys.path])
    build_backend.use()
    build_backend.use()
    assert sys.path.count(str(tmp_path / "active")) == 1
    assert sys.path[-1] == str(tmp_path / "active")  # behind all that the build has


def test_the_oldest_linux_that_a_wheel_is_for(extension):
    """The tag manylinux_2_34 may be given to what is built here; the libstdc++ needed is older, that of GCC 5.

    With the glibc 2.28 of the image that pyproject.toml names, all that glibc 2.34 renamed has its old name.
    """
    output = subprocess.run([command("readelf"), "-V", extension], check=True, capture_output=True, text=True).stdout
    assert max(map(version, re.findall(r"GLIBC_([\d.]+)", output))) <= (2, 34)
    assert max(map(version, re.findall(r"GLIBCXX_([\d.]+)", output))) <= (3, 4, 25)


def version(text):
    return tuple(int(part) for part in text.split("."))


def test_version_is_the_same_everywhere():
    assert importlib.metadata.version("kafops") == kafops.__version__
    dated = re.search(
        rf"^## \[{re.escape(kafops.__version__)}\] - (\d{{4}}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert dated is not None
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {kafops.__version__}\ndate-released: {dated[1]}\n" in citation


def test_hosted_ci_calls_targets_that_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    files = list((ROOT / ".github/workflows").glob("*.yml"))
    called = {name for file in files for name in re.findall(r"run: make (\S+)", file.read_text())}
    assert called >= {"lint", "test", "release-check"}
    assert called <= targets
