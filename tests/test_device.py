"""What a GPU would be asked to do: device operations, and how often the host waits for it, counted without a GPU.

A copy of the program takes the meta device for its GPU, as rank 0 of 8. Each copy between device and host that the host
waits for counts, and so does each wait for a stream.

    .venv/bin/python -m pytest -q tests/test_device.py
"""

import gc
import json
import os
import sys
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  knows the backend "fake"
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import DEADLINE, ROOT

WORLD, LAYERS, WINDOW = 8, 4, 2
VIEWS = {"view", "as_strided", "slice", "detach", "alias", "t", "transpose", "permute", "expand", "unsqueeze", "select",
         "_unsafe_view", "split", "empty", "empty_like", "empty_strided", "set_", "unbind", "squeeze", "_reshape_alias"}


# --- In a process of its own ------------------------------------------------------------------------------------------


class Device(TorchDispatchMode):
    """The meta device in the place of a GPU: counts operations, and what the host waits for."""

    def __init__(self):
        super().__init__()
        self.operations, self.waits = Counter(), Counter()
        self.message = lambda numel: [0.0] * numel  # what the host reads of a tensor in float64

    def wait(self, what):
        lines = [f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in traceback.extract_stack()
                 if Path(frame.filename).name in ("zero.py", "engine.py", "amp.py")]
        self.waits[f"{what} at {lines[-1] if lines else 'the test'}"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_meta:
            self.wait("item")
            return 0.0
        if name == "_to_copy" and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            if not kwargs.get("non_blocking"):
                self.wait("copy to the host")
            numbers = self.message(args[0].numel()) if args[0].dtype == torch.float64 else [0.0] * args[0].numel()
            return torch.tensor(numbers, dtype=kwargs.get("dtype") or args[0].dtype).view(args[0].shape)
        if name == "copy_" and args[0].is_meta != args[1].is_meta:
            if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
                self.wait("copy between host and device")
            return args[0] if args[0].is_meta else args[0].zero_()
        result = function(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self.operations[name] += name not in VIEWS and any(t.is_meta for t in tensors)
        if name == "_to_copy" and result.is_meta != args[0].is_meta and not kwargs.get("non_blocking"):
            self.wait("copy to the device")
        return result


groups: list[int] = []  # the process groups that were made and not ended


class Work:
    """A collective, stream or event that never has anything to wait for."""

    def __init__(self, *args, **kwargs):
        pass

    def wait(self, *args):
        pass

    wait_stream = wait_event = record = wait

    def record_event(self, *args):
        return Work()

    def synchronize(self):
        device.wait("synchronize")


pinned: dict[int, int] = {}  # bytes by address


class Runtime:
    """The part of CUDA's runtime that pins memory."""

    @staticmethod
    def cudaHostRegister(address, size, flags):
        assert size and address % 4096 == size % 4096 == flags == 0, "not in whole pages"
        assert address not in pinned, "pinned twice"
        pinned[address] = size

    @staticmethod
    def cudaHostUnregister(address):
        del pinned[address]


def on_device(*tensors):
    assert all(tensor.is_meta for tensor in tensors), "a host tensor in a collective of the device"
    return Work()


def pretend(zero):
    """A process group of 8 on the meta device, and CUDA's names for it."""
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=dist.HashStore())
    for name in ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor"):
        setattr(dist, name, lambda output, given, group=None, async_op=False: on_device(output, given))
    dist.all_reduce = dist.broadcast = lambda tensor, *args, **kwargs: on_device(tensor)
    dist.new_group = lambda *args, **kwargs: groups.append(len(groups)) or groups[-1]
    dist.destroy_process_group = lambda group=None: groups.remove(group)
    zero.gather = lambda value, group=None: [value] * WORLD
    zero.own_device = lambda local_rank: torch.device("meta")
    zero.start_process_group = lambda *args, **kwargs: False
    zero.Logbook = mock.MagicMock()
    torch.cuda.Stream = torch.cuda.Event = Work
    torch.cuda.current_stream, torch.cuda.stream = Work, lambda stream: nullcontext()
    torch.cuda.cudart, torch.cuda.check_error, torch.cuda.synchronize = Runtime, lambda code: None, lambda *args: None
    torch.Tensor.record_stream = lambda self, stream: None
    make = torch.tensor

    def tensor(*args, **kwargs):
        if torch.device(kwargs.get("device") or "cpu").type == "meta":
            device.wait("torch.tensor on the device")
        return make(*args, **kwargs)

    torch.tensor = tensor


def count(section: dict, options: dict) -> dict:
    """Operations of the last backward and step of a window, and the host's waits in the whole window."""
    import engine as deepspeed
    import train_gpt
    import zero
    torch.manual_seed(0)
    model = train_gpt.GPT(32, LAYERS, 4, 8).to("meta")
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": WINDOW, "gradient_clipping": 0.5,
              "optimizer": {"type": "AdamW", "params": {"fused": True}}, **options,
              "zero_optimization": {"reduce_bucket_size": 6000, **section}}
    nothing = {"new": lambda *args, **kwargs: None}
    with (mock.patch.object(deepspeed, "_check_arguments", **nothing),  # it refuses a model on the meta device
          mock.patch("torch.optim.adam._device_dtype_check_for_fused", **nothing)):
        engine = deepspeed.initialize(model=model, config=config)[0]
        slots = sum(len(bucket.slots) for bucket in engine.zero.trained)
        device.message = lambda numel: [1.0] + [8.0] * slots + [0.0] * (numel - slots - 1)
        batch = torch.zeros(2, 8, dtype=torch.long, device="meta")
        for micro_batch in range(2 * WINDOW):
            if micro_batch == WINDOW:
                device.waits.clear()
            loss = engine(batch, batch)
            device.operations.clear()
            engine.backward(loss)
            backward = device.operations.total()
            device.operations.clear()
            engine.step()
        most = sum(pinned.values())
        engine.destroy()
        del engine, loss, model
        gc.collect()
    return {"waits": dict(device.waits), "backward": backward, "step": device.operations.total(), "pinned": most,
            "pinned after": sum(pinned.values()), "groups left": len(groups)}


def plain() -> int:
    """Operations of plain PyTorch's backward."""
    import train_gpt
    model, batch = train_gpt.GPT(32, LAYERS, 4, 8).to("meta"), torch.zeros(2, 8, dtype=torch.long, device="meta")
    for _ in range(2):
        loss = model(batch, batch)
        device.operations.clear()
        loss.backward()
    return device.operations.total()


def count_all(folder: Path) -> None:
    """In a process that has the program's own modules already: the same with those of ``folder``, for all CASES."""
    global device
    for name in ("zero", "engine", "amp", "checkpointing", "schedulers", "train_gpt"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    import zero
    assert zero.__file__.startswith(str(folder))
    gc.freeze()  # collecting garbage need not look through PyTorch's half a million objects each time
    device = Device()
    pretend(zero)
    with device:
        found = [plain(), [count(section, options) for section, options in CASES]]
    (folder / "counts.json").write_text(json.dumps(found))
    os._exit(0)


# --- In the tests' process --------------------------------------------------------------------------------------------


def copy_program(folder: Path) -> None:
    """The program with the meta device in the place of CUDA's."""
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        if path.name in ("zero.py", "engine.py"):
            assert 'device.type == "cuda"' in text
            text = text.replace('"meta" if device.type == "meta" else "cpu"', '"cpu"')  # the host of a real GPU
            text = text.replace('device.type == "cuda"', 'device.type == "meta"')
            text = text.replace('device.type != "cuda"', 'device.type != "meta"')
        (folder / path.name).write_text(text)


CPU, BF16 = {"device": "cpu"}, {"bf16": {"enabled": True}}
CASES = [({"stage": stage} | section, options) for stage, section, options in [
    (0, {}, {}), (1, {}, {}), (2, {}, {}), (3, {}, {}), (1, {}, BF16), (3, {}, BF16),
    (3, {}, {"fp16": {"enabled": True}}),
    (2, {"offload_optimizer": CPU}, BF16), (3, {"offload_optimizer": CPU}, BF16), (3, {"offload_param": CPU}, BF16),
    (3, {"offload_optimizer": CPU, "offload_param": CPU}, BF16), (2, {"offload_optimizer": CPU | {"ratio": 0.5}}, {})]]


@pytest.fixture(scope="module")
def counts(run_ranks, tmp_path_factory):
    """What plain PyTorch asks of the device, and what each of CASES does."""
    folder = tmp_path_factory.mktemp("program")
    copy_program(folder)
    process = run_ranks.context.Process(target=count_all, args=(folder,))
    process.start()
    process.join(DEADLINE)
    assert process.exitcode == 0
    return json.loads((folder / "counts.json").read_text())


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: json.dumps(CASES[case]))
def test_the_host_waits_once_a_step_and_few_operations_come_to_plain_pytorchs(counts, case):
    plain, found = counts[0], counts[1][case]
    offloads = "offload_optimizer" in CASES[case][0]
    waits = found["waits"]
    assert sum(waits.values()) <= (2 if offloads else 1), f"{CASES[case]}: the host waits for {waits}"
    assert found["backward"] <= 1.6 * plain, f"{CASES[case]}: {found['backward']} operations, plain PyTorch {plain}"
    assert found["step"] <= 60, f"{CASES[case]}: {found['step']} operations in a step, four for each wave of updates"
    assert found["groups left"] == found["pinned after"] == 0
    assert (found["pinned"] > 0) == any(key.startswith("offload") for key in CASES[case][0])


@pytest.mark.parametrize("count, variables, expected", [
    (8, {"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}, 5),
    (1, {"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none", "CUDA_VISIBLE_DEVICES": "5"}, 0),
    (1, {"LOCAL_WORLD_SIZE": "8"}, 0),
    (1, {"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}, "8 processes on this machine need as many GPUs; it "),
    (4, {"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}, "need as many GPUs; it has 4"),
])
def test_each_process_takes_its_own_gpu(count, variables, expected):
    """Also where each process is shown one alone."""
    import zero  # not above: a process of this file imports a copy

    names = "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"
    variables = {name: value for name, value in os.environ.items() if name not in names} | variables
    with mock.patch.dict(os.environ, variables, clear=True), mock.patch.multiple(
            torch.cuda, is_available=lambda: True, device_count=lambda: count, set_device=mock.DEFAULT) as patched:
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                zero.own_device(5)
        else:
            assert zero.own_device(5) == torch.device("cuda", expected)
            patched["set_device"].assert_called_once_with(expected)
