"""Layers that hold integers: what takes the place of nn.Linear and nn.Embedding in a quantized model.

    Int8Linear       a byte for each weight, a scale for each row; the inputs stay as they are
    Int4Linear       half a byte for each weight, a scale (and a zero point) for each group of a row
    W8A8Linear       as Int8Linear, and the inputs are rounded to 8 bits too, token by token: integers times integers
    OutlierLinear    as W8A8Linear, but for a few inputs that are too large to share a scale (LLM.int8(), Dettmers et
                     al. 2022)
    Int8Embedding    the token table, a scale for each token; where it is tied, the head is an Int8Linear around the
                     same bytes

dequantized() is the plain way and the reference: the weight as a float matrix, multiplied as ever. It is right for many
rows, where the product costs more than the conversion. For few rows reading the weights is all that counts, and
`product` reads them as they are: on a GPU PyTorch's operators (native_product), on a CPU small_batch_matmul.cpp;
small_batch_matmul.for_small_batches chooses.

Shape letters: see model.py and integers.py.
"""
import torch
import torch.nn.functional as F
from torch import nn

from cli import InputError
from integers import Format, from_integers, pack4, unpack4

# Who wrote a folder, in its config.json. Not under "quant_method", as other formats do it: a method that it does not
# know, transformers passes over with a warning, and takes integers for weights. A description without one it refuses.
WRITTEN_BY = "chapter-07-quantization"


class Int8Linear(nn.Module):
    """x (T, K) -> (T, N)."""

    def __init__(self, K, N, format, dtype):
        super().__init__()
        self.in_features, self.out_features, self.format = K, N, format
        self.product, self.few = None, 0   # another way for up to so many rows: a function of x
        self.allocate(K, N, dtype)

    def allocate(self, K, N, dtype):
        self.register_buffer("weight", torch.empty(N, K, dtype=torch.int8))
        # A parameter because it is cast with the norms: everything but the integers is of one dtype.
        self.scale = nn.Parameter(torch.empty(N, dtype=dtype), requires_grad=False)

    def fill(self, integers, scale, zero):
        """Hold what integers.to_integers and choose_scale make of a weight."""
        self.weight, self.scale.data = integers, scale[:, 0]

    def dequantized(self):
        """The weight (N, K) in scale's dtype."""
        return from_integers(self.weight, self.scale[:, None])

    def forward(self, x):
        if 0 < len(x) <= self.few:   # an expert may get none
            return self.product(x)
        return F.linear(x, self.dequantized())

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}"


class Int4Linear(Int8Linear):

    def allocate(self, K, N, dtype):
        shape = N, K // (self.format.group or K)
        self.register_buffer("weight", torch.empty(N, K // 2, dtype=torch.uint8))
        self.register_buffer("zero", None if self.format.symmetric else torch.empty(shape, dtype=torch.uint8))
        self.scale = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

    def fill(self, integers, scale, zero):
        self.weight, self.scale.data, self.zero = pack4(integers), scale, zero

    def dequantized(self):
        zero = torch.full_like(self.scale, 8, dtype=torch.uint8) if self.zero is None else self.zero
        return from_integers(unpack4(self.weight), self.scale, zero)


def integer_rows(x):
    """x (T, K) -> int8 (T, K) and scale (T, 1), float32: absmax for each token, found anew each time ("dynamic")."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)   # a row of zeros
    return (x / scale).round().to(torch.int8), scale


def integer_product(a, b):
    """a (T, K) and b (N, K), int8 -> a b^T (T, N), int32, or where integers are slow float32, exact up to sums of 2^24.
    """
    if a.is_cpu and not torch.cpu._is_vnni_supported():
        return F.linear(a.float(), b.float())
    spare = 17 - len(a) if a.is_cuda and len(a) < 17 else 0   # on a GPU the operator wants more than 16 rows
    return torch._int_mm(F.pad(a, (0, 0, 0, spare)), b.T)[:len(a)]


class W8A8Linear(Int8Linear):
    """Matrix units compute with 8 bits twice as fast as with 16: this is for many rows.

    With few, reading takes as long as before.
    """

    def forward(self, x):
        integers, scale = integer_rows(x)
        return (integer_product(integers, self.weight) * (scale * self.scale.float())).to(x.dtype)


class OutlierLinear(W8A8Linear):
    """Inputs that are now and then far larger than the others are multiplied as they are, only the rest as integers.

    One such input makes the scale of its token so coarse that all others round to nothing. The paper looks for them in
    every batch; but then a token would change how those before it are rounded. So here they are found once, with
    calibration text, and their columns of the weight are kept as they were.
    """

    def hold(self, columns, weight):
        """columns (n,): numbers of such inputs; weight (N, n), for which the integers have zeros."""
        self.register_buffer("outlier", columns)
        self.outlier_weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        apart = F.linear(x[:, self.outlier], self.outlier_weight)
        return super().forward(x.index_fill(1, self.outlier, 0)) + apart


class Int8Embedding(nn.Module):
    """ids (T,) -> (T, D) from a table of bytes."""

    def __init__(self, V, D, dtype):
        super().__init__()
        self.register_buffer("weight", torch.empty(V, D, dtype=torch.int8))
        self.scale = nn.Parameter(torch.empty(V, dtype=dtype), requires_grad=False)

    fill = Int8Linear.fill

    def forward(self, ids):
        return self.weight[ids].to(self.scale.dtype) * self.scale[ids, None]


# ------------------------------------------------------------------------------------------------- a model of them

CLASSES = {(8, "float"): Int8Linear, (4, "float"): Int4Linear, (8, "int8"): W8A8Linear,
           (8, "int8 but outliers"): OutlierLinear}


def is_known(described):
    """Whether `quantization_config` of a config.json is one of ours."""
    writers = described.get("written_by"), described.get("quant_method")   # folders of before have the second
    return (writers in ((WRITTEN_BY, None), (None, WRITTEN_BY))
            and (described.get("bits"), described.get("activations")) in CLASSES
            and type(described.get("group_size")) is int and described["group_size"] >= 0
            and type(described.get("symmetric")) is bool
            and ("outliers" in described) == (described["activations"] == "int8 but outliers"))


def check_device(described, widths, device):
    """Raises InputError where a device cannot multiply integers with integers. widths: of the rows of all matrices."""
    if described["activations"] == "float" or device == "cpu":
        return
    if device != "cuda":
        raise InputError(f"{described.get('method')} multiplies integers with integers, and torch cannot on {device};"
                         " use --device cpu, or int8")
    if any(width % 8 for width in widths):
        raise InputError(f"{described.get('method')} on a GPU needs rows of a multiple of 8, and they are"
                         f" {', '.join(map(str, sorted(widths)))} long; use --device cpu, or int8")


def linear_layers(module):
    """[(parent, name, layer)] of what is quantized: the products with large matrices.

    The router of experts is small, and sensitive.
    """
    return [(parent, name, layer) for parent in module.modules() for name, layer in parent.named_children()
            if isinstance(layer, (nn.Linear, Int8Linear)) and name != "gate"]


def empty_layer(linear, described):
    """What takes the place of an nn.Linear, on its device, to be filled."""
    layer = CLASSES[described["bits"], described["activations"]]
    format = Format(described["bits"], described["group_size"], described["symmetric"])
    with linear.weight.device:
        return layer(linear.in_features, linear.out_features, format, linear.weight.dtype)


def replace_layers(model, described):
    """Give a Transformer the layers that config.json describes.

    The token table and the head are int8 whatever the others are.
    """
    names = {module: name for name, module in model.named_modules()}
    for parent, name, layer in linear_layers(model.model.layers):
        empty = empty_layer(layer, described)
        if "outliers" in described:
            n = described["outliers"].get(names[layer], 0)
            empty.hold(torch.empty(n, dtype=torch.int64), layer.weight.new_empty(layer.out_features, n))
        setattr(parent, name, empty)
    table = model.model.embed_tokens.weight
    with table.device:
        model.model.embed_tokens = Int8Embedding(*table.shape, table.dtype)
        model.lm_head = Int8Linear(*table.shape[::-1], Format(8), table.dtype)
    model.loss = lambda x, weight, targets: loss_of_head(model.lm_head, x, targets)


def loss_of_head(head, x, targets, rows=256):
    """Nats over all targets, a few rows at a time: linear_cross_entropy would need the head's weight as a float matrix.
    """
    return sum(F.cross_entropy(head(a).float(), b, reduction="sum") for a, b in zip(x.split(rows), targets.split(rows)))


# ------------------------------------------------------------------------------------------------- PyTorch's operators

def native_product(layer):
    """x -> x weight^T by the operator of PyTorch that reads the integers themselves, or None where there is none.

    PyTorch wants its own order of the bytes for 4 bits, another on each device. So a folder holds the plain order, and
    the device that will compute packs. The operators' names begin with _: they may change, and torchao at work hides
    that.
    """
    scale, device = layer.scale.detach(), layer.weight.device.type
    if type(layer) is Int8Linear:
        return lambda x: torch._weight_int8pack_mm(x, layer.weight, scale)
    group = layer.in_features * layer.out_features // scale.numel()
    fits = group in (32, 64, 128, 256) and layer.out_features % 16 == 0
    if device == "cuda":
        fits = (fits and layer.in_features % 128 == 0 and scale.dtype == torch.bfloat16
                and torch.cuda.get_device_capability(scale.device) >= (8, 0))
    if type(layer) is Int4Linear and fits:
        zero = 8.0 if layer.zero is None else layer.zero.to(scale.dtype)
        pairs = torch.stack([scale, (8 - zero) * scale], dim=-1)   # of (q - 8) * scale + zero
        pairs = pairs.transpose(0, 1).contiguous()                 # (K / group, N, 2)
        if device == "cpu":
            packed = torch._convert_weight_to_int4pack_for_cpu(unpack4(layer.weight).int(), 1)
            return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, group, pairs)
        # The first of two in the high half.
        packed = torch._convert_weight_to_int4pack(layer.weight << 4 | layer.weight >> 4, 8)
        return lambda x: torch._weight_int4pack_mm(x, packed, group, pairs)
