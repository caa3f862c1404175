"""GGUF models (llama.cpp's format, architecture "llama") as a source of weights.

gguf_header.py reads and checks the header, gguf_config.py makes a LlamaConfig of the metadata; here
the tensors are found, read and unpacked. Unpacking is the `gguf` package's work. Its GGUFReader is
not used: it makes several arrays for each token of the vocabulary (seconds, and hundreds of MB) and
trusts the lengths it finds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxdecode.checkpoint.gguf_config import ROPE_FREQS, config_from_header
from jaxdecode.checkpoint.gguf_header import GgufHeader, GgufTensor, quoted, read_header
from jaxdecode.checkpoint.source import TensorInfo, check_shapes
from jaxdecode.models.config import LlamaConfig

if TYPE_CHECKING:
    from jaxdecode.tokenizer import Tokenizer

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# Numbers unpacked at a time: what fits in a core's cache together with the unpacking's temporaries.
_CHUNK = 1 << 16

_TOP_NAMES = {
    "embed": ("token_embd",),
    "final_norm.scale": ("output_norm",),
    "head": ("output",),
}
_LAYER_NAMES = {
    "attn_norm.scale": ("attn_norm",),
    "attn.q": ("attn_q",),
    "attn.kv": ("attn_k", "attn_v"),
    "attn.o": ("attn_output",),
    "mlp_norm.scale": ("ffn_norm",),
    "mlp.gate_up": ("ffn_gate", "ffn_up"),
    "mlp.down": ("ffn_down",),
}


def open_gguf(path: str | os.PathLike[str]) -> GgufSource:
    """Open a GGUF model; only its header (and Llama 3's few rotary divisors) is read.

    Raises:
      CheckpointError: the file is missing, damaged, of a kind that cannot be read, or its tensors
        are not those its metadata announces; ConfigError for the metadata itself.
    """
    header = read_header(Path(path))
    try:
        return GgufSource(header)
    except BaseException:
        header.file.close()
        raise


class GgufSource:
    """An opened GGUF model: a WeightSource.

    Attributes:
      config: what the metadata describes; dtype is "float32" for quantised files.
      quantised: whether any tensor is packed in blocks.
      path: the file.
      tensors: shape, type and bytes by the file's own tensor names.
    """

    def __init__(self, header: GgufHeader):
        self._header = header
        self.path = header.path
        kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
        self.quantised = not kinds <= _PLAIN.keys()
        dtype = _PLAIN[kinds.pop()].name if len(kinds) == 1 and not self.quantised else "float32"
        self.config: LlamaConfig = config_from_header(header, dtype, _rope_freqs(header))
        self.tensors = {
            name: TensorInfo(tensor.shape, _type_name(tensor.kind), tensor.num_bytes)
            for name, tensor in header.tensors.items()
        }
        _check_tensors(header, self.config)

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""
        self._header.file.close()

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the file's metadata, None if there is none.

        Raises:
          CheckpointError: its metadata is damaged (TokenizerError: or contradictory).
        """
        from jaxdecode.tokenizer import Tokenizer

        keys = [key for key in self._header.values if key.startswith("tokenizer.")]
        if "tokenizer.ggml.tokens" not in keys:
            return None
        return Tokenizer.from_gguf_metadata({key: self._header.value(key) for key in keys})

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A piece of one parameter, unpacked.

        Args:
          name: a key of `param_shapes(config)`.
          index: one slice of step 1 per axis of that parameter.

        Returns:
          The piece, in the stored type, or float32 where it is packed in blocks or stored in two
          types; it may be a transposed view.

        Raises:
          CheckpointError: the file has become shorter.
          KeyError, ValueError: there is no such parameter; the index does not fit it.
        """
        kind, tensors = self._stored(name)
        sizes = _sizes(kind, self.config)
        axes = [_range(piece, size) for piece, size in zip(index, sizes, strict=True)]
        match kind, axes:
            case "embed", [v, d]:
                return self._matrix(tensors[0], v, d)
            case "attn.q", [d, n, h]:
                heads = self._heads(tensors[0], n, d, rotary=True)
                return heads[:, h.start : h.stop].transpose(2, 0, 1)
            case "attn.kv", [d, halves, k, h]:
                pair = np.empty((len(halves), len(k), len(h), len(d)), _common_dtype(tensors))
                for half, out in zip(halves, pair, strict=True):
                    heads = self._heads(tensors[half], k, d, rotary=half == 0)
                    out[:] = heads[:, h.start : h.stop]
                return pair.transpose(3, 0, 1, 2)
            case "attn.o", [n, h, d]:
                H = sizes[1]
                heads = self._matrix(tensors[0], d, range(n.start * H, n.stop * H))
                heads = heads.reshape(len(d), len(n), H)
                return heads[:, :, h.start : h.stop].transpose(1, 2, 0)
            case "mlp.gate_up", [d, halves, f]:
                pair = np.empty((len(halves), len(f), len(d)), _common_dtype(tensors))
                for half, out in zip(halves, pair, strict=True):
                    self._matrix(tensors[half], f, d, out)
                return pair.transpose(2, 0, 1)
            case "mlp.down" | "head", [inputs, outputs]:
                return self._matrix(tensors[0], outputs, inputs).T
        return self._matrix(tensors[0], range(1), axes[0])[0]

    def _stored(self, name: str) -> tuple[str, list[GgufTensor]]:
        """The kind of a parameter (its name without the layer) and the tensors that hold it."""
        if name in _TOP_NAMES:
            kind, files = name, [f"{file}.weight" for file in _TOP_NAMES[name]]
        else:
            _, layer, kind = name.split(".", 2)
            files = [f"blk.{layer}.{file}.weight" for file in _LAYER_NAMES[kind]]
        return kind, [self._header.tensors[file] for file in files]

    def _heads(self, tensor: GgufTensor, heads: range, cols: range, *, rotary: bool) -> np.ndarray:
        """Some heads [n, H, cols] of a projection, its rows in Hugging Face's order."""
        H = _sizes("attn.q", self.config)[2]
        rows = self._matrix(tensor, range(heads.start * H, heads.stop * H), cols)
        if rotary:
            # llama.cpp turns neighbours 2j and 2j + 1, Hugging Face j and j + H / 2.
            rows = rows.reshape(len(heads), H // 2, 2, len(cols)).swapaxes(1, 2)
        return rows.reshape(len(heads), H, len(cols))

    def _matrix(
        self, tensor: GgufTensor, rows: range, cols: range, out: np.ndarray | None = None
    ) -> np.ndarray:
        return _read_matrix(self._header, tensor, rows, cols, out)


def _read_matrix(
    header: GgufHeader,
    tensor: GgufTensor,
    rows: range,
    cols: range,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Rows and columns of a tensor (a vector is one row), unpacking only the blocks they touch."""
    block_size, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    row_bytes = tensor.shape[-1] // block_size * block_bytes
    first, last = cols.start // block_size, -(-cols.stop // block_size)
    wanted = slice(cols.start - first * block_size, cols.stop - first * block_size)
    if out is None:
        out = np.empty((len(rows), len(cols)), _PLAIN.get(tensor.kind, np.dtype(np.float32)))
    if out.size == 0:
        return out
    step = max(1, _CHUNK // tensor.shape[-1])
    for begin in range(rows.start, rows.stop, step):
        end = min(begin + step, rows.stop)
        raw = header.read_bytes(tensor.offset + begin * row_bytes, (end - begin) * row_bytes)
        blocks = np.frombuffer(raw, np.uint8).reshape(end - begin, -1, block_bytes)[:, first:last]
        numbers = _unpack(blocks, tensor.kind).reshape(end - begin, -1)
        out[begin - rows.start : end - rows.start] = numbers[:, wanted]
    return out


def _unpack(blocks: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    blocks = np.ascontiguousarray(blocks)
    if kind in _PLAIN:
        return blocks.view(_PLAIN[kind])
    # As one long row: the gguf package unpacks rows in small groups, which costs twice the time.
    with np.errstate(over="ignore", invalid="ignore"):
        return dequantize(blocks.reshape(1, -1), kind)


def _rope_freqs(header: GgufHeader) -> np.ndarray | None:
    tensor = header.tensors.get(ROPE_FREQS)
    if tensor is None:
        return None
    small = len(tensor.shape) == 1 and tensor.shape[0] <= 4096
    return _read_matrix(header, tensor, range(1), range(tensor.shape[0] if small else 0))[0]


def _common_dtype(tensors: list[GgufTensor]) -> np.dtype:
    dtypes = {_PLAIN.get(tensor.kind, np.dtype(np.float32)) for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _range(piece: slice, size: int) -> range:
    start, stop, step = piece.indices(size)
    if step != 1:
        raise ValueError(f"only slices of step 1 can be read, found {piece}")
    return range(start, max(start, stop))


def _sizes(kind: str, config: LlamaConfig) -> tuple[int, ...]:
    """Shape of a parameter in our order."""
    D, F, V = config.embed_dim, config.ffw_dim, config.vocab_size
    N, K, H = config.num_q_heads, config.num_kv_heads, config.head_dim
    return {
        "embed": (V, D),
        "attn.q": (D, N, H),
        "attn.kv": (D, 2, K, H),
        "attn.o": (N, H, D),
        "mlp.gate_up": (D, 2, F),
        "mlp.down": (F, D),
        "head": (D, V),
    }.get(kind, (D,))


def _expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes by the file's own tensor names."""
    D, F, V = config.embed_dim, config.ffw_dim, config.vocab_size
    N, K, H = config.num_q_heads, config.num_kv_heads, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    if not config.tie_embeddings:
        shapes["output.weight"] = (V, D)
    layer = {
        "attn_norm": (D,),
        "attn_q": (N * H, D),
        "attn_k": (K * H, D),
        "attn_v": (K * H, D),
        "attn_output": (D, N * H),
        "ffn_norm": (D,),
        "ffn_gate": (F, D),
        "ffn_up": (F, D),
        "ffn_down": (D, F),
    }
    for i in range(config.num_layers):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _check_tensors(header: GgufHeader, config: LlamaConfig) -> None:
    expected = _expected_shapes(config)
    # Old files carry the rotary frequencies of each layer, which follow from the metadata.
    found = {
        name if name in expected else quoted(name): tensor.shape
        for name, tensor in header.tensors.items()
        if name != ROPE_FREQS and not name.endswith(".attn_rot_embd.weight")
    }
    hint = "the file is damaged or holds no LLaMA model"
    check_shapes(header.path, expected, found, hint)


def _type_name(kind: GGMLQuantizationType) -> str:
    return _PLAIN[kind].name if kind in _PLAIN else kind.name
