"""`accelerate` changes how the gradients are computed, and nothing else."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import tempfile

import pytest
import timm
import torch
import torchvision
from torch import nn

from convnext_min import fast
from convnext_min.blocks import ConvNeXtBlock
from convnext_min.convnext import Block, convnext_atto
from convnext_min.fast import block, cache, kernels
from convnext_min.roadmap import build


def gradients(module, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in module.parameters())]


def assert_same(got, right, tolerance=1e-5):
    for a, b in zip(got, right, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max() / b.abs().max()


@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 6, 14, 14), (3, 5, 13, 9), (2, 4, 12, 15)])
def test_gradients_equal_autograds(kernel, stride, shape):
    torch.manual_seed(0)
    chans = shape[1]
    conv = nn.Conv2d(chans, chans, kernel, stride, kernel // 2, groups=chans)
    x = torch.randn(shape)
    right = gradients(conv, x)
    assert_same(gradients(fast.accelerate(conv), x), right)


@pytest.mark.parametrize(
    "make",
    [
        lambda: convnext_atto(num_classes=3, layer_scale_init_value=1.0),
        lambda: timm.create_model("convnext_atto", num_classes=3),
        lambda: torchvision.models.convnext_tiny(num_classes=3),
        lambda: torchvision.models.mobilenet_v2(num_classes=3),
    ],
    ids=["ours", "timm", "torchvision", "mobilenet"],
)
def test_models_of_any_library_compute_what_they_did(make):
    torch.manual_seed(0)
    model = make().eval()
    x, before = torch.randn(2, 3, 64, 64), {key: value.clone() for key, value in model.state_dict().items()}
    right = gradients(model, x)
    assert fast.accelerate(model) is model
    assert any(isinstance(module, fast.FastDepthwise) for module in model.modules())
    assert_same(gradients(model, x), right, tolerance=1e-4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert list(before) == list(model.state_dict())


def test_restore_brings_every_class_back():
    for model in (convnext_atto(num_classes=3), build("convnext", width_multiplier=0.1), build("kernel5")):
        kinds = [type(module) for module in model.modules()]
        fast.accelerate(model)
        changed = {type(m) for m, kind in zip(model.modules(), kinds) if type(m) is not kind}
        assert changed and all(kind.__module__.startswith("convnext_min.fast") for kind in changed)
        assert [type(module) for module in fast.restore(model).modules()] == kinds


def test_copies_and_pickles_work():
    model = fast.accelerate(convnext_atto(num_classes=3)).eval()
    x = torch.randn(1, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


def test_under_autocast_the_gradients_stay_close():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 7, padding=3, groups=8)
    x = torch.randn(2, 8, 16, 16)
    right = gradients(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(fast.accelerate(conv), x)
    assert_same([part.float() for part in got], right, tolerance=0.02)


def spread(module):
    """Weights at which every gradient matters."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return module


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels-last"])
@pytest.mark.parametrize("shape", [(1, 24, 4, 4), (3, 40, 13, 9)])
@pytest.mark.parametrize(
    "make",
    [
        lambda dim: Block(dim, layer_scale_init_value=1.0),
        lambda dim: Block(dim, layer_scale_init_value=0.0),
        lambda dim: Block(dim, drop_path=0.5, layer_scale_init_value=1.0),
        *(lambda dim, k=k: ConvNeXtBlock(dim, dim, kernel_size=k) for k in (3, 5, 9, 11, 13)),
        lambda dim: nn.Conv2d(dim, 16, 2, 2),
        lambda dim: nn.Conv2d(dim, 16, (4, 3), (4, 3)),
    ],
    ids=["scaled", "unscaled", "dropped", "3", "5", "9", "11", "13", "patches", "oblong"],
)
def test_gradients_of_blocks_and_their_surroundings_equal_autograds(make, shape, layout):
    module, x = spread(make(shape[1])), torch.randn(shape).to(memory_format=layout)
    torch.manual_seed(1)
    right = gradients(module, x)
    plain = type(module)
    torch.manual_seed(1)  # stochastic depth drops the same images
    got = gradients(fast.accelerate(module), x)
    assert type(module) is not plain
    assert_same(got, right)
    torch.manual_seed(1)
    again = gradients(fast.restore(module), x)
    assert all(torch.equal(a, b) for a, b in zip(again, right))


def test_in_bfloat16_the_error_is_no_larger_than_the_plain_models():
    model = spread(Block(40, layer_scale_init_value=1.0))
    x = torch.randn(4, 40, 12, 12)
    right = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        plain, got = gradients(model, x), gradients(fast.accelerate(model), x)
    ratios = [
        ((ours - exact).norm() / (theirs - exact).norm()).item() for exact, theirs, ours in zip(right, plain, got)
    ]
    assert max(ratios) < 2 and sum(ratios) < len(ratios)  # each is a matter of chance, the mean hardly


def forget_kernels():
    kernels.kernels.cache_clear()
    kernels.compile_ahead.cache_clear()


@pytest.fixture
def compile_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget_kernels()
    yield
    forget_kernels()


@pytest.fixture
def no_compiler(monkeypatch, compile_again):
    monkeypatch.setenv("CXX", "no-such-compiler")


def test_without_a_compiler_it_says_so_once_and_computes_the_same(no_compiler, recwarn):
    model, x = spread(convnext_atto(num_classes=3, dims=(8, 8, 8, 8))), torch.randn(2, 3, 64, 64)
    right = gradients(model, x)
    fast.accelerate(model)
    assert_same(gradients(model, x), right, 1e-4)
    gradients(model, x)
    said = [warning for warning in recwarn if "kernels.cpp was not compiled" in str(warning.message)]
    assert len(said) == 1 and "no-such-compiler" in str(said[0].message)


def script(path, text):
    """Write a shell script that can be executed, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "command", ["", " ", "c++ -DNAME='a b'", "wrapper c++", "'{folder}/my tools/c++' -g", "{folder}/my tools/c++"]
)
def test_cxx_can_have_arguments_a_wrapper_spaces_or_nothing(command, tmp_path, monkeypatch):
    script(tmp_path / "bin" / "wrapper", 'exec "$@"')
    script(tmp_path / "my tools" / "c++", 'exec c++ "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", command.format(folder=tmp_path))
    subprocess.run([*kernels.compiler(), "--version"], check=True)


@pytest.mark.parametrize("refused", ["-fopenmp)", "-fopenmp|-march=native)", "-fopenmp*|-march=*|-mcpu=*)"])
def test_a_compiler_without_openmp_or_native_code_builds_kernels_too(
    refused, tmp_path, monkeypatch, compile_again, recwarn
):
    refuse = f'for word; do case "$word" in {refused} echo "unsupported $word" >&2; exit 1;; esac; done'
    monkeypatch.setenv("CXX", script(tmp_path / "clang", refuse + '\nexec c++ "$@" -O0'))
    block, x = spread(Block(24, layer_scale_init_value=1.0)), torch.randn(2, 24, 9, 9)
    right = gradients(block, x)
    assert_same(gradients(fast.accelerate(block), x), right)
    assert kernels.kernels(torch.float32) is not None and not recwarn.list


@pytest.mark.parametrize("level, products", [("x86-64-v3", True), ("x86-64", False)])
@pytest.mark.parametrize("dim", [5, 8, 13, 24, 40])  # the last columns fill one, two or three registers, or a part
def test_a_block_computes_the_same_with_its_own_matrix_products(level, products, dim, monkeypatch, compile_again):
    if not torch.cpu.get_capabilities().get("avx2"):
        pytest.skip("needs a processor with AVX2")
    monkeypatch.setattr(kernels, "TARGETS", (["-fopenmp", f"-march={level}"],))
    block = spread(Block(dim, drop_path=0.3, layer_scale_init_value=1.0))
    for shape in ((7, dim, 3, 1), (3, dim, 43, 47)):  # 21 rows, and parts of more than 48 rows that end within an image
        x = torch.randn(shape)
        torch.manual_seed(1)
        right = gradients(block, x)
        torch.manual_seed(1)
        assert_same(gradients(fast.accelerate(block), x), right, 5e-5)
        with torch.no_grad():
            got = block.eval()(x)
            assert_same([got], [fast.restore(block)(x)])
        block.train()
    assert kernels.has_products(torch.float32) == products and not kernels.has_products(torch.bfloat16)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dim", [24, 26])  # with and without sums of the weights' gradients
def test_parts_computed_by_any_number_of_threads_are_the_same(threads, dim, monkeypatch, compile_again):
    if not torch.cpu.get_capabilities().get("avx2"):
        pytest.skip("needs a processor with AVX2")
    monkeypatch.setattr(kernels, "TARGETS", (["-fopenmp", "-march=x86-64-v3"],))
    x, conv, grad = (torch.randn(3, dim, 43, 47).to(memory_format=torch.channels_last) for _ in range(3))
    weight1, bias1, weight2, bias2 = (torch.randn(size) for size in ((4 * dim, dim), 4 * dim, (dim, 4 * dim), dim))
    gamma, keep = torch.randn(dim), torch.ones(3, 1, 1, 1)

    def compute():
        y, kept = block._in_blocks(x, conv, 1e-6, weight1, bias1, weight2, bias2, gamma, keep, True)
        conv_grad, sums, *rest = block._back_in_blocks(grad, *kept, weight1, weight2, bias2, gamma, keep)
        return y, *kept, conv_grad, sums, *(rest if dim % 4 == 0 else ())  # PyTorch's own products need not be the same

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        right = compute()
        torch.set_num_threads(threads)
        got = compute()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


@pytest.fixture
def cached(compile_again):
    if cache.private_folder() is None:
        pytest.skip("others can write to the temporary folder")


@pytest.fixture
def counted(tmp_path, monkeypatch, cached):
    """Set CXX to a quick compiler that adds a character to the file returned whenever it runs."""
    count = tmp_path / "count"
    count.write_text("")
    monkeypatch.setenv("CXX", script(tmp_path / "quick", f'printf x >> {count}\nexec c++ "$@" -O0'))
    return count


def load_again():
    forget_kernels()
    assert kernels.kernels(torch.float32) is not None


def test_kernels_are_compiled_once_for_a_compiler_and_a_machine(counted, monkeypatch):
    load_again()
    load_again()
    assert counted.read_text() == "x"
    folder = cache.private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700 and len(list(folder.iterdir())) == 1
    monkeypatch.setattr(cache, "machine", lambda: "another processor")
    load_again()
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -DANOTHER")
    load_again()
    assert counted.read_text() == "xxx"


def test_the_first_use_waits_for_the_running_compilation(counted, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "slow", f'sleep 1\nexec {os.environ["CXX"]} "$@"'))
    future = kernels.compile_ahead(torch.float32)
    assert not future.done()
    assert kernels.kernels(torch.float32) is future.result()
    assert counted.read_text() == "x"


def test_an_error_in_the_background_is_reported_at_the_first_use(no_compiler, recwarn):
    assert kernels.compile_ahead(torch.float32).exception() and not recwarn.list
    with pytest.warns(UserWarning, match="no-such-compiler"):
        assert kernels.kernels(torch.float32) is None


CONTROL_C = """
import os, pathlib, signal, sys, torch
from convnext_min.fast.kernels import compile_ahead
compile_ahead(torch.float32)
while not pathlib.Path(sys.argv[1]).read_text():
    pass
os.killpg(0, signal.SIGINT)  # as a terminal does, to the whole group
"""


def test_control_c_while_compiling_leaves_nothing_behind_and_keeps_the_library(counted, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = [sys.executable, "-c", CONTROL_C, str(counted)]
    done = subprocess.run(
        code, env=os.environ | {"TMPDIR": str(temporary)}, start_new_session=True, stderr=subprocess.PIPE
    )
    assert done.returncode == -signal.SIGINT and b"KeyboardInterrupt" in done.stderr
    assert not list(temporary.iterdir())
    load_again()
    assert counted.read_text() == "x"


def test_a_damaged_library_is_not_loaded(counted):
    load_again()
    (library,) = cache.private_folder().iterdir()
    library.write_bytes(library.read_bytes()[:-1] + b"?")
    load_again()
    assert counted.read_text() == "xx"


@pytest.mark.parametrize("change", ["writable", "writable parent", "link to a shared folder"])
def test_nothing_is_loaded_from_a_folder_that_others_can_write(change, counted, tmp_path):
    load_again()
    folder = cache.private_folder()
    if change == "writable":
        folder.chmod(0o770)
    elif change == "writable parent":
        folder.parent.chmod(0o777)
    else:
        folder.rename(tmp_path / "shared")
        (tmp_path / "shared").chmod(0o777)
        folder.symlink_to(tmp_path / "shared")
    assert cache.private_folder() is None
    load_again()
    assert counted.read_text() == "xx"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give folders away")
def test_nothing_is_loaded_from_a_folder_of_somebody_else(counted):
    load_again()
    os.chown(cache.private_folder(), 54321, -1)
    load_again()
    assert counted.read_text() == "xx"


def test_without_a_home_kernels_are_compiled_each_time(counted, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", lambda: _raise(RuntimeError("Could not determine home directory.")))
    load_again()
    load_again()
    assert counted.read_text() == "xx"


def test_a_full_disk_keeps_nothing_and_computes(counted, monkeypatch):
    monkeypatch.setattr(cache.shutil, "copy", lambda *args: _raise(OSError("No space left on device")))
    load_again()
    assert not list(cache.private_folder().iterdir())


def test_the_cache_is_bounded(cached, tmp_path):
    for number in range(cache.KEPT + 3):
        library = tmp_path / "library"
        library.write_bytes(bytes([number]))
        cache.keep(library, f"{number:016}")
    assert len(list(cache.private_folder().iterdir())) == cache.KEPT
    assert cache.find(f"{cache.KEPT + 2:016}").read_bytes() == bytes([cache.KEPT + 2])


def _raise(error):
    raise error


def test_without_a_temporary_folder_it_computes_the_same(monkeypatch, compile_again):
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *args, **kwargs: _raise(FileNotFoundError("no usable folder")))
    block, x = spread(Block(8, layer_scale_init_value=1.0)), torch.randn(2, 8, 9, 9)
    right = gradients(block, x)
    with pytest.warns(UserWarning, match="no usable folder"):
        assert_same(gradients(fast.accelerate(block), x), right)


def test_a_loaded_library_need_not_be_deleted(tmp_path, monkeypatch, compile_again):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CXX", script(tmp_path / "quick", 'exec c++ "$@" -O0'))
    monkeypatch.setattr(os, "unlink", lambda *args, **kwargs: _raise(PermissionError("in use")))  # as on Windows
    assert kernels.kernels(torch.float32) is not None


def test_any_message_of_a_compiler_can_be_shown(tmp_path, monkeypatch, compile_again):
    monkeypatch.setenv("CXX", script(tmp_path / "c++", r"printf '\377\376 f\303\274r' >&2; exit 1"))
    with pytest.warns(UserWarning, match="f\u00fcr"):
        assert kernels.kernels(torch.float32) is None


def test_an_unreadable_cxx_is_named(monkeypatch, compile_again):
    monkeypatch.setenv("CXX", "c++ '-O2")
    with pytest.warns(UserWarning, match="No closing quotation"):
        assert kernels.kernels(torch.float32) is None


def test_kernels_refuse_tensors_that_are_no_arrays():
    x = torch.randn(4, 4)
    for tensor in (x[:, ::2], x.to("meta"), x.to(torch.float64), x.to_sparse(), torch._neg_view(x)):
        with pytest.raises(ValueError, match="needs a contiguous CPU tensor"):
            kernels.run(torch.float32, "gelu", tensor.numel(), tensor, torch.empty_like(x))


STEP = """
import copy, torch
from convnext_min.convnext import convnext_atto
from convnext_min.fast import accelerate
torch.manual_seed(0)
plain = convnext_atto(num_classes=3, dims=(8, 8, 8, 8), layer_scale_init_value=1.0)
model, x = accelerate(copy.deepcopy(plain)), torch.randn(2, 3, 32, 32)
for network in (plain, model):
    network(x).square().sum().backward()
for a, b in zip(model.parameters(), plain.parameters()):
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max().item())
"""


def test_without_assertions_python_computes_the_same():
    subprocess.run([sys.executable, "-O", "-c", STEP], check=True)


def test_what_the_kernels_cannot_compute_is_computed_as_before():
    block = spread(Block(8, layer_scale_init_value=1.0))
    x = torch.randn(2, 8, 6, 6)
    double = copy.deepcopy(block).double()
    right = gradients(double, x.double())
    assert_same(gradients(fast.accelerate(double), x.double()), right, 1e-12)
    assert fast.accelerate(copy.deepcopy(block)).to("meta")(x.to("meta")).shape == x.shape
    relu = copy.deepcopy(block)
    relu.act = nn.ReLU()
    right = gradients(relu, x)
    assert_same(gradients(fast.accelerate(relu), x), right)
    heard = []
    fast.accelerate(block).pwconv1.register_forward_hook(lambda *args: heard.append(args))
    block(x)
    assert heard
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        fast.accelerate(nn.Conv2d(3, 8, 4, 4))(torch.randn(1, 3, 3, 3))
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4"):
        fast.accelerate(nn.Conv2d(3, 8, 4, 4))(torch.randn(1, 4, 8, 8))


def narrow(block):
    block.pwconv1, block.pwconv2 = nn.Linear(8, 16), nn.Linear(16, 8)


def one_gamma(block):
    block.gamma = nn.Parameter(torch.tensor([0.5]))


def round_the_edge(block):
    block.dwconv = nn.Conv2d(8, 8, 7, padding=3, padding_mode="circular", groups=8)


def dense(block):
    block.dwconv = nn.Conv2d(8, 8, 7, padding=3)


@pytest.mark.parametrize("change", [narrow, one_gamma, round_the_edge, dense])
def test_a_block_with_other_sizes_or_another_convolution_is_computed_as_before(change):
    block = Block(8, layer_scale_init_value=1.0)
    change(block)
    x = torch.randn(2, 8, 9, 9)
    right = gradients(block, x)
    assert_same(gradients(fast.accelerate(block), x), right)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_inference_computes_what_training_does(context):
    model, x = spread(convnext_atto(num_classes=300)).eval(), torch.randn(2, 3, 48, 48)
    with context():
        right = model(x)
        got = fast.accelerate(model)(x)
        with torch.autocast("cpu", torch.bfloat16):
            half, plain = model(x).float(), fast.restore(copy.deepcopy(model))(x).float()
    assert_same([got], [right])
    assert_same([fast.accelerate(model)(x).detach()], [right])
    assert (half - right).norm() < 1.5 * (plain - right).norm()


def test_torch_compile_sees_the_plain_model():
    model = fast.accelerate(Block(8, layer_scale_init_value=1.0))
    x = torch.randn(2, 8, 6, 6)
    compiled_model = torch.compile(model, backend="eager", fullgraph=True)  # the kernels could not be traced
    assert torch.allclose(compiled_model(x), model(x), atol=1e-6)


def test_averages_of_the_weights_go_on_working():
    model = fast.accelerate(convnext_atto(num_classes=3))
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    before = model.head.weight.detach().clone()
    model.head.weight.data.add_(1.0)
    average.update_parameters(model)
    torch.testing.assert_close(average.module.head.weight.data, before + 0.5)
    assert average(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_processes_that_start_together_do_not_disturb_each_other(tmp_path):
    code = "import torch; from convnext_min.fast import kernels; assert kernels.kernels(torch.float32)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]


@pytest.mark.parametrize("layout", ["NCHW", "channels-last", "crop"])
@pytest.mark.parametrize("shape", [(1, 3, 5, 4), (4, 40, 9, 7)], ids=str)
def test_gelu_has_autograds_gradient(shape, layout):
    torch.manual_seed(0)
    x = 3 * torch.randn(*shape[:2], shape[2] + 2, shape[3] + 2)[..., 1:-1, 1:-1]
    formats = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
    x = x.contiguous(memory_format=formats[layout]) if layout in formats else x
    assert_same(gradients(fast.accelerate(nn.GELU()), x), gradients(nn.GELU(), x.double()))
    tanh = nn.GELU("tanh")  # another function, left alone
    assert_same(gradients(fast.accelerate(tanh), x), gradients(nn.GELU("tanh"), x), 0)


def test_stochastic_depth_drops_the_same_images_of_a_batch():
    block, x = spread(Block(8, drop_path=0.5, layer_scale_init_value=1.0)), torch.randn(8, 8, 6, 6)
    torch.manual_seed(1)
    right = gradients(block, x)
    torch.manual_seed(1)
    assert_same(gradients(fast.accelerate(block), x), right)
    dropped = (right[0] == x).flatten(1).all(1)
    assert 0 < dropped.sum() < 8


@pytest.mark.parametrize("slug", ["depthwise", "inverted", "gelu", "convnext"])
def test_steps_of_the_road_have_the_plain_ones_gradients(slug):
    torch.manual_seed(0)
    model, x = build(slug, num_classes=3, width_multiplier=0.1).eval(), torch.randn(2, 3, 64, 64)
    right = gradients(copy.deepcopy(model).double(), x.double())
    assert_same(gradients(fast.accelerate(model), x), right, 1e-4)


def test_the_blocks_at_the_end_of_the_road_are_computed_as_one_operation(monkeypatch):
    calls = []
    monkeypatch.setattr(fast.BlockFunction, "apply", lambda *args: calls.append(args) or args[2])
    fast.accelerate(build("convnext", num_classes=3, width_multiplier=0.1))(torch.randn(1, 3, 64, 64))
    assert len(calls) == 18
