"""An accelerated model behaves like the plain one under every tool of PyTorch, and raises where the plain one raises.

Each `case` does something to a model and returns what came out of it: tensors, counts, names. It runs on a plain model
and on an accelerated copy, and both have to return the same.
"""

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, functionalize, grad, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from convnext_min import fast
from convnext_min.blocks import ConvNeXtBlock
from convnext_min.convnext import Block, LayerNorm

CASES = {}


class Net(nn.Module):
    """A network with every kind of layer that `accelerate` replaces: images (N, 3, H, W) to (N, 5)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.block = Block(8, layer_scale_init_value=1.0)
        self.down = nn.Sequential(LayerNorm(8), nn.Conv2d(8, 16, 2, 2))
        self.road = ConvNeXtBlock(16, 16, kernel_size=3)
        self.mix = nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.act = nn.GELU()
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.road(self.down(self.block(self.stem(x))))
        return self.head(self.act(self.mix(x)).mean([-2, -1]))


def case(function):
    CASES[function.__name__] = function
    return function


def images(*shape, seed=1):
    return torch.randn(*(shape or (2, 3, 32, 32)), generator=torch.Generator().manual_seed(seed))


def gradients(model, y):
    model.zero_grad()
    y.square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def step(model, x=None):
    """Return the output of a training step and all gradients."""
    y = model(images() if x is None else x)
    return [y.detach(), *gradients(model, y)]


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    model = Net().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


def outcome(function, model):
    """Return what `function` returns, or the kind of error that it raises."""
    torch.manual_seed(0)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return tree_flatten(function(model))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            return [type(error).__name__], None


# Tracers and exporters; the graph is run on other images than it was traced with.


@case
def jit_trace(model):
    return step(torch.jit.trace(model, images(seed=2)))


@case
def jit_trace_without_gradients(model):
    with torch.no_grad():
        return torch.jit.trace(model, images(seed=2))(images())


@case
def jit_script(model):
    kinds = [type(module) for module in model.modules()]
    results = step(torch.jit.script(model))
    assert kinds == [type(module) for module in model.modules()]
    return results


@case
def fx(model):
    graph = torch.fx.symbolic_trace(model)
    return step(graph), sum("getattr" in node.name for node in graph.graph.nodes)


@case
def feature_extractor(model):
    from torchvision.models.feature_extraction import create_feature_extractor

    features = create_feature_extractor(model, ["stem", "block", "road"])(images())
    return {name: feature.detach() for name, feature in features.items()}


@case
def export_non_strict(model):
    return step(torch.export.export(model, (images(seed=2),), strict=False).module())


@case
def export_strict(model):
    program = torch.export.export(model, (images(seed=2),), strict=True)
    return [program.module()(images()), [str(node.target) for node in program.graph.nodes]]


@case
def export_dynamic(model):
    sizes = {"x": {0: torch.export.Dim("batch", min=2)}}
    return torch.export.export(model, (images(seed=2),), dynamic_shapes=sizes).module()(images(5, 3, 32, 32))


@case
def compile_eager(model):
    return step(torch.compile(model, backend="eager", fullgraph=True))


@case
def compile_aot(model):
    return step(torch.compile(model, backend="aot_eager", fullgraph=True))


@case
def compile_in_place(model):
    model.block.pwconv1.compile(backend="eager")
    return step(model)


def _operations(graph):
    return sorted(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


@case
def make_fx_real(model):
    graph = make_fx(model)(images(seed=2))
    return graph(images()), _operations(graph)


@case
def make_fx_symbolic(model):
    graph = make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(images(seed=2))
    return graph(images()), _operations(graph)


@case
def make_fx_pre_dispatch(model):
    graph = make_fx(model, pre_dispatch=True)(images(seed=2))
    return graph(images()), _operations(graph)


@case
def make_fx_of_gradients(model):
    def function(parameters, x):
        return torch.autograd.grad(functional_call(model, parameters, x).sum(), list(parameters.values()))

    parameters = dict(model.named_parameters())
    return make_fx(function)(parameters, images(seed=2))(parameters, images())


@case
def onnx_dynamo(model):
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(model, (images(seed=2),), dynamo=True, verbose=False)
    return [len(program.model.graph), sorted(node.op_type for node in program.model.graph)]


@case
def onnx_torchscript(model):
    onnx = pytest.importorskip("onnx")
    file = io.BytesIO()
    torch.onnx.export(model, (images(seed=2),), file, dynamo=False)
    return sorted(node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node)


@case
def tensorboard_graph(model):
    from torch.utils.tensorboard._pytorch_graph import graph

    return len(graph(model, images())[0].node) > 20


@case
def fake_tensors(model):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        return list(model(torch.empty(2, 3, 32, 32)).shape)


@case
def flop_counter(model):
    with FlopCounterMode(display=False) as counter:
        model(images()).sum().backward()
    return counter.get_total_flops()


@case
def dispatch_mode(model):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        results = step(model)
    return results, sorted(seen)


@case
def dispatch_mode_in_the_backward_pass_alone(model):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    y = model(images())
    with Mode():
        return gradients(model, y)


@case
def function_mode(model):
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (F.gelu, F.layer_norm, F.linear, F.conv2d):
                seen.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Mode():
        model(images())
    return seen


# Subclasses of Tensor


class Logged(torch.Tensor):
    seen = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Logged.seen += function is F.gelu or function is torch._C._nn.gelu
        return super().__torch_function__(function, types, args, kwargs or {})


@case
def subclass_as_input(model):
    Logged.seen = 0
    y = model(images().as_subclass(Logged))
    return type(y).__name__, Logged.seen, y.detach().as_subclass(torch.Tensor)


@case
def subclass_as_layer_scale(model):
    model.block.gamma = nn.Parameter(model.block.gamma.detach().as_subclass(Logged))
    return type(model.block(images(2, 8, 8, 8))).__name__


# Transforms of torch.func and derivatives of all kinds


@case
def func_vmap(model):
    return vmap(model)(images(3, 2, 3, 32, 32)).detach()


@case
def func_per_sample_gradients(model):
    def loss(parameters, image):
        return functional_call(model, parameters, image[None]).square().sum()

    return vmap(grad(loss), (None, 0))(dict(model.named_parameters()), images())


@case
def func_ensemble(model):
    parameters, buffers = stack_module_state([model, copy.deepcopy(model)])
    return vmap(partial(functional_call, model), (0, None))((parameters | buffers), images()).detach()


@case
def func_jvp(model):
    return [part.detach() for part in jvp(model, (images(),), (images(seed=3),))]


@case
def func_jacobians(model):
    x = images(1, 3, 8, 8)
    return jacrev(model)(x).detach(), jacfwd(model)(x).detach()


@case
def func_hessian(model):
    return torch.func.hessian(lambda x: model.mix(model.act(x)).square().sum())(images(1, 16, 2, 2)).detach()


@case
def func_functionalize(model):
    return functionalize(model)(images()).detach()


@case
def func_call_with_other_parameters(model):
    others = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    return functional_call(model, others, images())


@case
def dual_numbers(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(images(), images(seed=3)))).tangent.detach()


@case
def batched_gradients(model):
    x = images().requires_grad_()
    y = model(x)
    return torch.autograd.grad(y, [x, *model.parameters()], images(3, *y.shape, seed=3), is_grads_batched=True)


@case
def vectorized_jacobian(model):
    return torch.autograd.functional.jacobian(model, images(1, 3, 8, 8), vectorize=True)


def _gradient_penalty(model, x):
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return [slope.detach(), *gradients(model, slope)]


@case
def double_backward(model):
    return _gradient_penalty(model, images())


@case
def double_backward_in_float64(model):
    return _gradient_penalty(model.double(), images().double())


@case
def double_backward_of_tied_parameters(model):
    model.block.norm.bias = model.block.norm.weight
    return _gradient_penalty(model, images())


@case
def third_derivative(model):
    x = images(1, 3, 8, 8).requires_grad_()
    y = model(x).square().sum()
    for _ in range(3):
        (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return y.detach()


@case
def hessian_vector_product(model):
    return torch.autograd.functional.hvp(lambda x: model(x).square().sum(), images(), images(seed=3))


@case
def backward_twice(model):
    y = model(images()).square().sum()
    y.backward(retain_graph=True)
    y.backward()
    return [parameter.grad for parameter in model.parameters()]


@case
def gradients_of_some_parameters(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)
    y = model(images())
    y.sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@case
def gradient_of_the_input_alone(model):
    x = images().requires_grad_()
    model.requires_grad_(False)(x).square().sum().backward()
    return x.grad


@case
def no_gradients(model):
    with torch.no_grad():
        y = model(images())
    return y, y.requires_grad


@case
def inference_mode(model):
    with torch.inference_mode():
        y = model(images())
    return y, y.is_inference()


@case
def checkpointed(model):
    return _checkpointed(model, False)


def _checkpointed(model, reentrant):
    y = checkpoint(model, images().requires_grad_(), use_reentrant=reentrant)
    return [y.detach(), *gradients(model, y)]


@case
def checkpointed_reentrant(model):
    return _checkpointed(model, True)


@case
def anomaly_detection(model):
    with torch.autograd.detect_anomaly():
        return step(model)


# Hooks: how often they are called, and the gradients that they see


def _hooked(register, *names):
    """Return a case that counts the calls of hooks of the layers `names`."""

    def count(model):
        calls = []
        for name in names:
            register(model.get_submodule(name))(lambda *args, name=name: calls.append(name))
        return step(model), calls

    return count


LAYERS = [f"{block}.{part}" for block in ("block", "road") for part in ("dwconv", "norm", "pwconv1", "act", "pwconv2")]
LAYERS += ["block", "road", "stem", "mix", "act", "block.drop_path", "road.drop_path"]
for _kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
    CASES[_kind] = _hooked(lambda module, kind=_kind: getattr(module, f"register_{kind}"), *LAYERS)
    for _layer in ("block.pwconv1", "road.drop_path"):
        CASES[f"{_kind}_of_{_layer}"] = _hooked(lambda module, kind=_kind: getattr(module, f"register_{kind}"), _layer)


def _globally_hooked(kind):
    def count(model):
        calls = []
        handle = getattr(module_hooks, f"register_module_{kind}")(lambda module, *args: calls.append(1))
        try:
            return step(model), len(calls)
        finally:
            handle.remove()

    return count


for _kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
    CASES[f"global_{_kind}"] = _globally_hooked(_kind)


@case
def forward_hook_that_changes_the_output(model):
    model.block.pwconv1.register_forward_hook(lambda module, args, output: 2 * output)
    return step(model)


@case
def parameter_hooks(model):
    calls = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: calls.append(name) or 2 * gradient)
        parameter.register_post_accumulate_grad_hook(lambda parameter: calls.append(1))
    return step(model), len(calls)


@case
def saved_tensors_unchanged(model):
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return step(model)


@case
def saved_tensors_offloaded(model):
    with save_on_cpu():
        return step(model)


@case
def saved_tensors_transposed(model):
    def pack(tensor):
        return tensor.mT.contiguous() if tensor.ndim >= 2 else tensor.repeat_interleave(2)

    def unpack(tensor):
        return tensor.mT if tensor.ndim >= 2 else tensor[::2]

    with saved_tensors_hooks(pack, unpack):
        return step(model)


@case
def saved_tensors_as_subclass(model):
    with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor.as_subclass(Logged)):
        return [gradient.as_subclass(torch.Tensor) for gradient in step(model)]


# Other forward methods and other layers


@case
def forward_of_a_layer(model):
    calls = []
    for name in ("block.pwconv1", "road.norm", "block.drop_path", "mix"):
        layer = model.get_submodule(name)
        layer.forward = lambda x, name=name, before=layer.forward: calls.append(name) or before(x)
    return step(model), calls


@case
def forward_of_a_class(model):
    calls, before = [], nn.Linear.forward
    nn.Linear.forward = lambda self, x: calls.append(1) or before(self, x)
    try:
        return step(model), len(calls)
    finally:
        nn.Linear.forward = before


@case
def dropout_for_stochastic_depth(model):
    model.block.drop_path = nn.Dropout(0.5)
    return step(model.train())


@case
def norm_of_the_other_layout(model):
    model.block.norm = LayerNorm(8)
    return step(model)


@case
def tanh_gelu(model):
    model.block.act, model.act = nn.GELU("tanh"), nn.GELU("tanh")
    return step(model)


@case
def changed_settings(model):
    model.block.dwconv.dilation, model.block.dwconv.padding = (2, 2), (6, 6)
    model.mix.dilation, model.mix.padding = (2, 2), (4, 4)
    model.stem.stride, model.stem.padding = (2, 2), (1, 1)
    return step(model)


@case
def arguments_by_name(model):
    return model.mix(input=images(1, 16, 4, 4)), model.stem(input=images()), model.act(input=images())


# Number formats


@case
def float64(model):
    return step(model.double(), images().double())


@case
def bfloat16(model):
    return [part.float() for part in step(model.bfloat16(), images().bfloat16())]


@case
def float16(model):
    return model.half()(images().half()).detach().float()


for _dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64):
    CASES[f"{_dtype}_images"] = lambda model, dtype=_dtype: step(model, images().to(dtype))
    CASES[f"{_dtype}_into_a_layer"] = lambda model, dtype=_dtype: step(model.mix, images(2, 16, 8, 8).to(dtype))


@case
def float64_weight_of_one_layer(model):
    model.block.gamma = nn.Parameter(model.block.gamma.detach().double())
    return step(model.block, images(2, 8, 8, 8))


@case
def autocast_float16(model):
    with torch.autocast("cpu", torch.float16):
        return [part.float() for part in step(model)]


@case
def default_dtype(model):
    x = images()
    torch.set_default_dtype(torch.float64)
    try:
        return step(model, x)
    finally:
        torch.set_default_dtype(torch.float32)


# Layouts, strides, sizes, devices


def _of_images(change):
    return lambda model: step(model, change(images(4, 3, 32, 32)))


for _name, _change in {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: x[::2],
    "cropped": lambda x: x[..., 3:-5, 1:-2],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "transposed": lambda x: x.mT,
    "flipped": lambda x: x.flip(3),
    "negated": torch._neg_view,
    "imaginary": lambda x: torch.complex(x, 2 * x).conj().imag,
    "empty": lambda x: x[:0],
    "one_image": lambda x: x[0],
    "a_vector": lambda x: x[0, 0, 0],
    "five_axes": lambda x: x[None],
    "too_small": lambda x: x[..., :3, :3],
    "wrong_channels": lambda x: x[:, :2],
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "not_a_tensor": lambda x: x.tolist(),
}.items():
    CASES[f"images_{_name}"] = _of_images(_change)
    CASES[f"layer_input_{_name}"] = lambda model, change=_change: step(model.mix, change(images(4, 16, 9, 9)))


@case
def block_of_something_else(model):
    return model.block(images().tolist())


@case
def more_channels_than_the_layer_has(model):
    return step(model.mix, images(2, 32, 8, 8))


@case
def meta_device(model):
    y = model.to("meta")(images().to("meta"))
    return str(y.device), list(y.shape)


@case
def meta_input_to_a_cpu_model(model):
    return list(model(images().to("meta")).shape)


@case
def default_device(model):
    x = images()
    with torch.device("meta"):
        return step(model, x)


@case
def default_device_in_the_backward_pass(model):
    y = model(images())
    with torch.device("meta"):
        return gradients(model, y)


# Parameters


def _with_parameters(change):
    def run(model):
        for layer in (*model.block.modules(), *model.road.modules(), model.mix, model.stem):
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(change(parameter.detach())))
        return step(model)

    return run


for _name, _change in {
    "strided": lambda weight: torch.stack([weight, weight], -1)[..., 0],
    "expanded": lambda weight: weight[:1].expand(weight.shape) if weight.ndim == 1 else weight,
    "transposed": lambda weight: weight.movedim(0, -1).contiguous().movedim(-1, 0),
    "flattened": lambda weight: torch.cat([weight.flatten(), weight.flatten()])[weight.numel() :].view(weight.shape),
    "negated": torch._neg_view,
}.items():
    CASES[f"parameters_{_name}"] = _with_parameters(_change)


@case
def plain_tensors_for_parameters(model):
    for layer in (model.block, model.block.pwconv1, model.mix):
        for name, parameter in list(layer.named_parameters(recurse=False)):
            delattr(layer, name)
            setattr(layer, name, parameter.detach() * 2)
    return step(model)


@case
def missing_biases(model):
    model.block.pwconv2.bias = model.mix.bias = model.stem.bias = model.road.norm.bias = None
    return step(model)


@case
def pruned(model):
    for layer in (model.block.dwconv, model.block.pwconv1, model.mix, model.stem):
        prune.l1_unstructured(layer, "weight", 0.5)
    return step(model), sorted(model.state_dict())


@case
def weight_norm(model):
    for layer in (model.block.dwconv, model.block.pwconv1, model.mix, model.stem):
        parametrizations.weight_norm(layer)
    return step(model), sorted(model.state_dict())


@case
def old_weight_norm(model):
    for layer in (model.block.dwconv, model.block.pwconv1, model.mix, model.stem):
        nn.utils.weight_norm(layer)
    return step(model), sorted(model.state_dict())


@case
def quantized_dynamically(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)(images()).detach()


@case
def deepcopied(model):
    return step(copy.deepcopy(model))


@case
def pickled(model):
    return step(pickle.loads(pickle.dumps(model)))


@case
def saved_with_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return step(torch.load(file, weights_only=False))


def _largest(tensor):
    return tensor.detach().abs().max().item() if tensor.numel() else 0.0


@pytest.mark.parametrize("name", CASES)
def test_an_accelerated_model_does_as_the_plain_one(name, plain):
    accelerated = fast.accelerate(copy.deepcopy(plain))
    right, structure = outcome(CASES[name], copy.deepcopy(plain))
    got, same_structure = outcome(CASES[name], accelerated)
    assert got == right if structure is None else structure == same_structure
    for a, b in zip(got, right, strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * max(_largest(b), 1e-3))
        else:
            assert a == b
