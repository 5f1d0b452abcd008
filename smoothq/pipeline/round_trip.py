"""Round-trip check: the written checkpoint, loaded again, must compute what the run computed.

A few tokens, and one sequence with images where there is one in the calibration data, are taken
through the quantized blocks during the run. Before the checkpoint is renamed
to the output it is loaded as a user loads it, and its block outputs and logits on these tokens are
compared with those of the run. The tolerance is the effect of a relative change of 1e-6 in the
embedding: a quantizer is a step function, so the last bits of a float may change a code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures.graph import text_config
from ..architectures.linearize import SeparateExperts
from ..architectures.positions import positions_of
from ..checkpoint.check import check_tensors
from ..checkpoint.loading import load_as_stored
from ..checkpoint.model_config import read_config
from ..checkpoint.skeleton import skeleton_of
from ..checkpoint.source import Source
from ..checkpoint.tensor_file import as_bytes
from ..checkpoint.weight_files import read_tensor, tensor_files
from ..data.tokens import Batch
from ..errors import CalibrationError, OutputError
from ..modules import (
    OnlineRotation,
    QuantizedLinear,
    quantize_attention,
    stop_quantizing_attention,
)
from ..modules.prepare import prepare
from ..modules.quantized_embedding import EMBEDDING_BITS
from ..plan.account import Account, outside_blocks
from ..plan.config import quantization_of
from ..plan.install import install
from ..plan.plan import Plan
from ..rounding.packing import pack
from ..runtime.distributed import World
from ..runtime.mapped import mapped
from ..runtime.memory import give_back, spare_memory
from .ends import Block, ModelTail, coded_rows, embed_tokens, output_of, stored_rows, tower_tensors
from .hidden_states import HiddenStates
from .trace import tensors_of
from .weights_on_demand import WORKING_DTYPE

STREAM = "roundtrip"  # the name of the check's hidden states in a saved state
SEQUENCES, LENGTH = 2, 64  # shape of the check's token ids
CHANGE = 1e-6  # relative standard deviation of a change of the embedding
CHANGES = 8  # random changes that are tried before a difference counts as an error
MARGIN = 4.0  # allowed difference / effect of one change, which is only a random sample
SMALL_BYTES = 32 << 20  # a checkpoint that needs no more memory is always loaded whole
ROUNDING = 1e-5  # relative difference that is always allowed, for float32 rounding errors


class RoundTrip:
    """Computes a few tokens during the run, and compares the written checkpoint with the results.

    Attributes:
        stream: the tokens' hidden states, advanced through the quantized blocks.
    """

    def __init__(
        self,
        source: Source,
        model: PreTrainedModel,
        plan: Plan,
        account: Account,
        world: World,
        featured: Sequence[Batch] = (),
    ) -> None:
        """Choose and embed the tokens.

        Args:
            source: the float checkpoint.
            model: the float model on the meta device; unchanged on return.
            plan: its plan.
            account: shapes and dtypes of the tensors to be written.
            world: the ranks of the run.
            featured: calibration data with images or sound, of which the shortest is taken.
        """
        self._source, self._model, self._plan = source, model, plan
        self._account, self._world = account, world
        self._batches = [Batch(_tokens(model))]
        shortest = sorted(featured, key=lambda batch: batch.tokens.numel())[:1]
        try:
            self._batches += shortest
            self.stream = self._embedded(world)
        except CalibrationError:
            if not shortest:
                raise
            self._batches = shortest  # text skips blocks that images go through
            self.stream = self._embedded(world)
        # One allocation: many small tensors that stay alive would fragment the heap.
        length = len(self._sketch_of(self.stream))
        self._room = torch.empty(len(plan.blocks), length, dtype=torch.float32)
        self._sketches: dict[int, Tensor] = {}

    def _embedded(self, world: World, entry: bool = True) -> HiddenStates:
        """The hidden states that enter the first block, rotated by the runtime's operator.

        entry: whether they are rotated where they enter, beside what is added between the blocks.
        """
        rotation = self._plan.residual_rotation
        online = None if rotation is None else OnlineRotation(rotation)
        return embed_tokens(
            cast(Source, _Stored(self._source, self._account)),
            self._model,
            self._plan,
            self._batches,
            world,
            as_stored=True,
            rotate=online if entry else lambda x: x,
            rotate_added=online,
        )

    def _sketch_of(self, stream: HiddenStates) -> Tensor:
        """The sketch of hidden states of all batches."""
        return torch.cat([_sketch(stream.batch(number)) for number in range(len(stream))])

    @torch.no_grad()
    def follow(self, block: Block, stored: dict[str, Tensor]) -> None:
        """Advance the tokens' hidden states through a quantized block.

        Args:
            block: the quantized block; its float tensors are rounded to their stored values.
            stored: the block's tensors by full name, in the dtypes of the file.
        """
        for key, tensor in block.module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(stored[f"{block.name}.{key}"])
        with _attention_as_planned(block, self._plan, self._world.device):
            self.stream.advance(block.module, block.index)
        if self.stream.reach(block.index):
            sketch, room = self._sketch_of(self.stream), self._room[block.index]
            kept = room.copy_(sketch) if room.shape == sketch.shape else sketch
            self._sketches[block.index] = kept

    @torch.no_grad()
    def compare(self, directory: Path) -> None:
        """Compare a written checkpoint with the results of the run.

        Tensors outside the blocks are compared with the source element by element. The checkpoint
        is loaded whole if that takes no more memory than the run did, else block by block.

        Args:
            directory: the complete checkpoint.

        Raises:
            OutputError: the results differ; the message names the first block that does.
        """
        stream = self.stream.gathered()
        give_back()
        whole = self._whole_bytes() <= max(SMALL_BYTES, spare_memory())
        files = tensor_files(directory, str(directory))

        def compared() -> None:
            self._compare_ends(files)
            if whole:
                self._compare_whole(directory, stream)
            else:
                self._compare_by_blocks(directory, files)

        self._world.broadcast_from(compared)

    def _whole_bytes(self) -> int:
        """Estimated bytes of the loaded checkpoint, float32 embedding and head, and the logits."""
        plan = self._plan
        codes = sum(spec.elements for _, spec, _ in plan.linears())
        last = plan.parts.ends[-1]
        rows = self._model.get_submodule(last).get_parameter("weight").shape[0]
        tokens = sum(batch.tokens.numel() for batch in self._batches)
        loaded = 8 * plan.float_elements + 2 * codes + 4 * 4 * tokens * rows
        return 2 * loaded  # some tensors exist twice while they are loaded

    def _compare_whole(self, directory: Path, stream: HiddenStates) -> None:
        trusted = self._source.trusts_code
        loaded: Any = load_as_stored(directory, str(directory), WORKING_DTYPE, trusted)
        loaded.to(self._world.device)
        stored: Any = _Stored(self._source, self._account)
        end = ModelTail(stored, self._plan, stream, as_stored=True)
        logits = [end.logits(stream, number).flatten() for number in range(len(stream))]
        expected = {**self._sketches, len(self._plan.blocks): torch.cat(logits)}
        del end, logits
        _require_equal(expected, len(self._plan.blocks), lambda seed: self._run(loaded, seed))

    def _run(self, loaded: PreTrainedModel, seed: int | None) -> dict[int, Tensor]:
        """Run a loaded model; sketches of its block outputs by block, then its logits.

        seed: of a random change of the embedding, or None for no change.
        """
        results = [self._run_on(batch, loaded, seed) for batch in self._batches]
        return {key: torch.cat([result[key] for result in results]) for key in results[0]}

    def _run_on(self, batch: Batch, loaded: PreTrainedModel, seed: int | None) -> dict[int, Tensor]:
        sketches: dict[int, Tensor] = {}

        def keep(index: int) -> Callable[..., None]:
            def kept(_module: nn.Module, _args: Any, output: Any) -> None:
                if index not in sketches:  # of several calls the first
                    sketches[index] = _sketch(tensors_of(output)[0])

            return kept

        blocks = loaded.get_submodule(self._plan.parts.layers).children()
        embedding = loaded.get_input_embeddings()
        with ExitStack() as hooks:
            for index, block in enumerate(blocks):
                hooks.enter_context(block.register_forward_hook(keep(index)))
            perturb = embedding.register_forward_hook(lambda _, args, out: _perturbed(out, seed))
            hooks.enter_context(perturb)
            features = {
                name: _perturbed(tensor, seed) if tensor.is_floating_point() else tensor
                for name, tensor in batch.features.items()
            }
            final = output_of(loaded, replace(batch, features=features).to(self._world.device))
        return {**sketches, len(self._plan.blocks): final.float().flatten()}

    def _compare_by_blocks(self, directory: Path, files: dict[str, Path]) -> None:
        name = str(directory)
        config = read_config(name, self._source.trusts_code)
        model = skeleton_of(config, name)
        install(model, quantization_of(config, name).plan_for(model))
        check_tensors(model, sorted({str(path) for path in files.values()}))
        # Not rotated here: the installed model's first block rotates its input online.
        entered = self._embedded(World(0, 1, self._world.device), entry=False)

        def run(seed: int | None) -> dict[int, Tensor]:
            stream = entered.copy()
            stream.replace(iter([_perturbed(tensor, seed) for tensor in entered]))
            return self._through(model, files, stream)

        _require_equal(self._sketches, len(self._plan.blocks), run)

    def _compare_ends(self, files: dict[str, Path]) -> None:
        """Compare the tensors outside the blocks with the source, element by element."""
        parts, source = self._plan.parts, self._source
        for name, spec in outside_blocks(self._account, self._plan, source).items():
            chunks: Iterable[Tensor] = ()
            if name.rpartition(".")[0] in self._plan.towers:
                continue
            if self._plan.tables and name in [f"{end}.weight" for end in parts.ends]:
                coded = coded_rows(source, name)
                chunks = (pack(rounded.codes, EMBEDDING_BITS) for rounded in coded)
            elif name in source.specs or name in source.extras:
                chunks = (rows.to(spec.dtype) for rows in stored_rows(source, name))
            flat, first = read_tensor(files[name], name).flatten(), 0
            for chunk in chunks:
                if as_bytes(chunk) != as_bytes(flat[first : first + chunk.numel()]):
                    raise _differs(f"tensor '{name}'")
                first += chunk.numel()
        for tower in self._plan.towers:
            tensors = tower_tensors(source, self._model, self._plan, tower, self._account)
            for name, tensor in tensors.items():
                if as_bytes(tensor) != as_bytes(read_tensor(files[name], name)):
                    raise _differs(f"tensor '{name}'")

    def _through(
        self, model: PreTrainedModel, files: dict[str, Path], stream: HiddenStates
    ) -> dict[int, Tensor]:
        """Sketches of the block outputs, each block loaded from the files and freed again."""
        sketches = {}
        layers = model.get_submodule(self._plan.parts.layers)
        for index, empty in enumerate(layers.children()):
            if not stream.reach(index):
                continue
            block = copy.deepcopy(empty)
            lean = _make_experts_lean(block)
            for key in list(block.state_dict()):
                name = f"{self._plan.parts.block_name(index)}.{key}"
                tensor = read_tensor(files[name], name)
                owner, _, leaf = key.rpartition(".")
                module = block.get_submodule(owner)
                if module in lean and leaf == "weight" and self._world.device.type == "cpu":
                    tensor = mapped(tensor, files[name].parent)
                else:
                    tensor = tensor.to(self._world.device, copy=True)
                if leaf in module._parameters:
                    parameter = nn.Parameter(tensor.to(WORKING_DTYPE), requires_grad=False)
                    module._parameters[leaf] = parameter
                else:
                    module._buffers[leaf] = tensor
            prepare(block)
            stream.advance(block, index)
            sketches[index] = self._sketch_of(stream)
            del block
            give_back()
        return sketches


def _make_experts_lean(block: nn.Module) -> set[nn.Module]:
    """Have a block's quantized experts run one by one, and keep nothing beside their codes."""
    experts = (module for module in block.modules() if isinstance(module, SeparateExperts))
    lean: set[nn.Module] = set()
    for module in experts:
        for linear in module.modules():
            if isinstance(linear, QuantizedLinear):
                linear.transient = True
                lean.add(linear)
    return lean


def _require_equal(
    expected: dict[int, Tensor], blocks: int, run: Callable[[int | None], dict[int, Tensor]]
) -> None:
    """Raise OutputError naming the first block whose output differs from the run's.

    A random change may happen to change no code, so several are tried before an output counts as
    different.

    Args:
        expected: block number → sketch of its output in the run; `blocks` → the logits.
        blocks: how many blocks the model has.
        run: computes the same for the written checkpoint, with the embedding changed at random
            from a seed, or unchanged for None.
    """
    actual = run(None)
    left = {index for index in expected if not torch.equal(actual[index], expected[index])}
    for seed in range(CHANGES):
        if not left:
            return
        perturbed = run(seed)
        left -= {
            index
            for index in left
            if _within_tolerance(actual[index], expected[index], perturbed[index])
        }
    if left:
        first = min(left)
        raise _differs(f"block {first}" if first < blocks else "what follows the blocks")


class _Stored:
    """A source whose float tensors are cast to the dtypes that the checkpoint stores."""

    def __init__(self, source: Source, account: Account) -> None:
        self._source, self._account = source, account

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as `Source.tensors` does, cast."""
        for name, tensor in self._source.tensors(names):
            yield name, self._cast(name, tensor)

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """Yield chunks of rows as `Source.rows` does, cast."""
        return (self._cast(name, rows) for rows in self._source.rows(name, count))

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        spec = self._account.get(name)
        cast = spec is not None and spec.dtype.is_floating_point and tensor.is_floating_point()
        return tensor.to(spec.dtype) if cast and spec is not None else tensor


def _tokens(model: PreTrainedModel) -> Tensor:
    """Random token ids, int64 (2, 64), without special tokens such as image placeholders."""
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
    """Context in which a block's attention is quantized as in the loaded model."""
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


def _perturbed(x: Tensor, seed: int | None) -> Tensor:
    """x with a relative random change of 1e-6 in every element; x itself if seed is None."""
    if seed is None:
        return x
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32)
    return x * (1 + CHANGE * noise.to(x.device))


def _sketch(hidden: Tensor) -> Tensor:
    """A random projection of every token's hidden state to one number: float (..., K) → (n,)."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(hidden.shape[-1], generator=generator, dtype=torch.float32)
    return (hidden.float() @ mix.to(hidden.device)).flatten().cpu()


def _within_tolerance(actual: Tensor, expected: Tensor, perturbed: Tensor) -> bool:
    """Whether an output differs from the expected one by no more than from its perturbed form.

    perturbed: the actual output after a small random change of the embedding.
    """
    allowed = MARGIN * (perturbed - actual).norm() + ROUNDING * expected.norm()
    return bool((actual - expected).norm() <= allowed)


def _differs(what: str) -> OutputError:
    return OutputError(
        f"the output, loaded again, differs from what was computed, first in {what}; nothing was "
        "placed: please report this, or leave the comparison out with check=False"
    )
