"""The last look at an output: loaded as a user loads it, it must compute what the pass computed.

A few tokens follow the quantized blocks through the pass. Before the output is placed it is loaded
again, and what it makes of those tokens is compared with the pass's own, block by block and in the
logits. The two may differ by what a change of 1e-6 in the embedding does: a quantizer is a step
function, and the last bits of a float may move a code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..architectures.graph import text_config
from ..architectures.positions import positions_of
from ..checkpoint.check import check_tensors
from ..checkpoint.source import (
    Source,
    read_config,
    read_tensor,
    skeleton_of,
    tensor_files,
)
from ..checkpoint.tensor_file import as_bytes
from ..errors import OutputError
from ..modules import OnlineRotation, quantize_attention, stop_quantizing_attention
from ..modules.prepare import prepare
from ..modules.quantized_embedding import EMBEDDING_BITS
from ..plan.account import Account
from ..plan.config import quantization_of
from ..plan.install import install
from ..plan.plan import Plan
from ..rounding.packing import pack
from ..runtime.distributed import World
from ..runtime.memory import give_back, spare_memory
from ..runtime.process import build_lock
from .ends import (
    WORKING_DTYPE,
    Block,
    ModelTail,
    coded_rows,
    embed_tokens,
    stored_rows,
)
from .hidden_states import HiddenStates

STREAM = "roundtrip"  # the name of its hidden states in a state to go on from
SEQUENCES, LENGTH = 2, 64
CHANGE = 1e-6  # of the embedding, relative
CHANGES = 8  # that are tried before an output counts as another
MARGIN = 4.0  # each is but a sample of what such changes do
SMALL_BYTES = 32 << 20  # which are taken in any case
ROUNDING = 1e-5  # relative; what float32 takes in any case


class RoundTrip:
    """Tokens on their way through the quantized blocks, and what the output makes of them."""

    def __init__(
        self, source: Source, model: PreTrainedModel, plan: Plan, account: Account, world: World
    ) -> None:
        """model: the skeleton of the source, left as it is."""
        self._source, self._model, self._plan = source, model, plan
        self._account, self._world = account, world
        self._ids = _tokens(model)
        rotation = plan.residual_rotation
        self.stream = self._enter(world, None if rotation is None else OnlineRotation(rotation))
        # In one piece: a small tensor a block would lie strewn over the heap and keep its holes.
        self._room = torch.empty(len(plan.blocks), *self._ids.shape, dtype=torch.float32)
        self._sketches: dict[int, Tensor] = {}

    def _enter(self, world: World, rotate: Callable[[Tensor], Tensor] | None) -> HiddenStates:
        stored: Any = _Stored(self._source, self._account)
        model, plan, batches = self._model, self._plan, [self._ids]
        return embed_tokens(stored, model, plan, batches, world, as_stored=True, rotate=rotate)

    @torch.no_grad()
    def follow(self, block: Block, stored: dict[str, Tensor]) -> None:
        """Move past a quantized block. stored: its tensors by full name, as they are in the file.

        The block takes over the digits that its floats have there.
        """
        for key, tensor in block.module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(stored[f"{block.name}.{key}"])
        with _attention_as_planned(block, self._plan, self._world.device):
            self.stream.advance(block.module, block.index)
        sketch = _sketch(self.stream.batch(0))
        self._sketches[block.index] = self._room[block.index].copy_(sketch)

    @torch.no_grad()
    def compare(self, directory: Path) -> None:
        """Raise OutputError, naming the first block that differs, unless an output is as computed.

        What lies outside the blocks is compared with the source, number by number. The output is
        loaded whole where that takes no more memory than the pass did, else block by block.
        """
        hidden = self.stream.batch(0)
        give_back()
        whole = self._whole_bytes() <= max(SMALL_BYTES, spare_memory())
        files = tensor_files(directory, str(directory))

        def compared() -> None:
            self._compare_ends(files)
            if whole:
                self._compare_whole(directory, hidden)
            else:
                self._compare_by_blocks(directory, files)

        self._world.broadcast_from(compared)

    def _whole_bytes(self) -> int:
        """What the loaded output takes, and beside it the ends in float32 and some logits."""
        plan = self._plan
        sites = [site for block in plan.blocks for site in block.sites]
        codes = sum(spec.elements for site in sites for spec in site.modules.values())
        rows = self._model.get_submodule(plan.parts.head).get_parameter("weight").shape[0]
        loaded = 8 * plan.float_elements + 2 * codes + 4 * 4 * self._ids.numel() * rows
        return 2 * loaded  # loading holds some of it twice

    def _compare_whole(self, directory: Path, hidden: Tensor) -> None:
        with build_lock:
            loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=WORKING_DTYPE)
        loaded.to(self._world.device)
        stored: Any = _Stored(self._source, self._account)
        end = ModelTail(stored, self._plan, self._world.device, as_stored=True)
        own = {**self._sketches, len(self._plan.blocks): end.logits(hidden)}
        del end
        _hold(own, len(self._plan.blocks), lambda seed: self._run(loaded, seed))

    def _run(self, loaded: PreTrainedModel, seed: int | None) -> dict[int, Tensor]:
        """Sketches of what leaves each block of a loaded model, and behind them its logits.

        seed: of a change of the embedding, or None for none.
        """
        sketches: dict[int, Tensor] = {}

        def keep(index: int) -> Callable[..., None]:
            def kept(module: nn.Module, args: Any, output: Any) -> None:
                sketches[index] = _sketch(output[0] if isinstance(output, tuple) else output)

            return kept

        blocks = loaded.get_submodule(self._plan.parts.layers).children()
        hooks = [block.register_forward_hook(keep(index)) for index, block in enumerate(blocks)]
        embedding = loaded.get_input_embeddings()
        hooks.append(embedding.register_forward_hook(lambda m, args, out: _moved(out, seed)))
        try:
            ids = self._ids.to(self._world.device)
            logits: Tensor = loaded(input_ids=ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return {**sketches, len(sketches): logits.float()}

    def _compare_by_blocks(self, directory: Path, files: dict[str, Path]) -> None:
        name = str(directory)
        config = read_config(name)
        model = skeleton_of(config, name)
        install(model, quantization_of(config, name).plan_for(model))
        check_tensors(model, sorted({str(path) for path in files.values()}))
        # The first block rotates what it is given by itself.
        entered = self._enter(World(0, 1, self._world.device), lambda x: x)

        def run(seed: int | None) -> dict[int, Tensor]:
            stream = entered.copy()
            stream.replace(iter([_moved(batch, seed) for batch in entered]))
            return self._through(model, files, stream)

        _hold(self._sketches, len(self._plan.blocks), run)

    def _compare_ends(self, files: dict[str, Path]) -> None:
        """Compare what lies outside the blocks with the source, number by number."""
        parts, source = self._plan.parts, self._source
        for name, spec in self._account.items():
            if name.startswith(f"{parts.layers}.") and name not in source.extras:
                continue
            rows: Iterable[Tensor] = ()
            if self._plan.tables and name in (f"{parts.embedding}.weight", f"{parts.head}.weight"):
                rows = (pack(each.codes, EMBEDDING_BITS) for each in coded_rows(source, name))
            elif name in source.specs or name in source.extras:
                rows = (each.to(spec.dtype) for each in stored_rows(source, name))
            flat, first = read_tensor(files[name], name).flatten(), 0
            for each in rows:
                if as_bytes(each) != as_bytes(flat[first : first + each.numel()]):
                    raise _differs(f"tensor '{name}'")
                first += each.numel()

    def _through(
        self, model: PreTrainedModel, files: dict[str, Path], stream: HiddenStates
    ) -> dict[int, Tensor]:
        """Sketches of what leaves each block, read one at a time from the files."""
        sketches = {}
        layers = self._plan.parts.layers
        for index, block in enumerate(model.get_submodule(layers).children()):
            for key in list(block.state_dict()):
                name = f"{layers}.{index}.{key}"
                tensor = read_tensor(files[name], name).to(self._world.device, copy=True)
                owner, _, leaf = key.rpartition(".")
                module = block.get_submodule(owner)
                if leaf in module._parameters:
                    held = nn.Parameter(tensor.to(WORKING_DTYPE), requires_grad=False)
                    module._parameters[leaf] = held
                else:
                    module._buffers[leaf] = tensor
            prepare(block)
            stream.advance(block, index)
            sketches[index] = _sketch(stream.batch(0))
            block.to("meta")
        return sketches


def _hold(
    own: dict[int, Tensor], blocks: int, run: Callable[[int | None], dict[int, Tensor]]
) -> None:
    """Raise OutputError naming the first block that differs from the pass's own.

    own: by block, and at the number behind the last the logits. run: the same of the output, with
    the embedding changed under a seed, or as it is. A change may happen to move no code, so one is
    not enough to say that something differs.
    """
    found = run(None)
    left = {index for index in own if not torch.equal(found[index], own[index])}
    for seed in range(CHANGES):
        if not left:
            return
        moved = run(seed)
        left -= {index for index in left if _alike(found[index], own[index], moved[index])}
    if left:
        first = min(left)
        raise _differs(f"block {first}" if first < blocks else "what follows the blocks")


class _Stored:
    """A source whose floats have the digits that the output has of them."""

    def __init__(self, source: Source, account: Account) -> None:
        self._source, self._account = source, account

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """As of a `Source`."""
        for name, tensor in self._source.tensors(names):
            yield name, self._cast(name, tensor)

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """As of a `Source`."""
        return (self._cast(name, rows) for rows in self._source.rows(name, count))

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        spec = self._account.get(name)
        cast = spec is not None and spec.dtype.is_floating_point and tensor.is_floating_point()
        return tensor.to(spec.dtype) if cast and spec is not None else tensor


def _tokens(model: PreTrainedModel) -> Tensor:
    """Tokens of no meaning, int64 (2, 64), none of which stands for something else, as an image."""
    configs = (model.config, text_config(model))
    special = {
        value
        for config in configs
        for key, value in config.to_dict().items()
        if key.endswith(("_token_id", "_token_index", "_id")) and isinstance(value, int)
    }
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    plain = torch.tensor([token for token in range(rows) if token not in special] or [0])
    length = min(LENGTH, positions_of(model) or LENGTH)
    generator = torch.Generator().manual_seed(0)
    return plain[torch.randint(len(plain), (SEQUENCES, length), generator=generator)]


@contextmanager
def _attention_as_planned(block: Block, plan: Plan, device: torch.device) -> Iterator[None]:
    """Within it a block's attention is what the loaded model's will be."""
    if plan.attention is None:
        yield
        return
    attention: Any = block.module.get_submodule(block.plan.attention)
    quantize_attention([attention], plan.attention, attention.config)
    attention.attention_quantizer.to(device)
    try:
        yield
    finally:
        stop_quantizing_attention(attention, attention.config)


def _moved(x: Tensor, seed: int | None) -> Tensor:
    """x with every number changed a little, or as it is without a seed."""
    if seed is None:
        return x
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32)
    return x * (1 + CHANGE * noise.to(x.device))


def _sketch(hidden: Tensor) -> Tensor:
    """A number a token, which changes as its hidden state does: float (..., K) → (...)."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(hidden.shape[-1], generator=generator, dtype=torch.float32)
    return (hidden.float() @ mix.to(hidden.device)).cpu()


def _alike(found: Tensor, wanted: Tensor, moved: Tensor) -> bool:
    """Whether one differs from what is wanted by no more than a small change makes it differ."""
    allowed = MARGIN * (moved - found).norm() + ROUNDING * wanted.norm()
    return bool((found - wanted).norm() <= allowed)


def _differs(what: str) -> OutputError:
    return OutputError(
        f"the output, loaded again, differs from what was computed, first in {what}; nothing was "
        "placed: please report this, or leave the comparison out with --no-check"
    )
