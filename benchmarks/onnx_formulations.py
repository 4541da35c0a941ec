"""Ways to write a site in ONNX, for ``benchmarks/onnx.py`` to compare with the one that the package writes.

The package concatenates all sources, and does everything once on the stack. Each of ``FORMULATIONS`` is another body of
the function ``attnres::BlockAttnRes`` over n sources ``v0 ... [B, T, D]``, in ONNX's textual form; each of
``TWO_PHASE`` one of ``attnres::AttendBlocks`` over n blocks and S reads, or of ``attnres::MergePartial``.
"""

from __future__ import annotations

from collections.abc import Callable

from onnx import parser
from onnxscript import ir

WEIGHT = """
    w = Mul (query, gain)
    scale_given = Constant <value_float: float = @scale> ()
    scaled = Mul (w, scale_given)
    last = Constant <value_ints = [-1]> ()
    before_last = Constant <value_ints = [-2]> ()"""
STACK = """
    side_by_side = Concat <axis = -1> ({sources})
    shape = Constant <value_ints = [0, 0, {n}, -1]> ()
    v = Reshape (side_by_side, shape)"""
NORM = "RMSNormalization <axis = -1, epsilon: float = @eps>"


def names(letter: str, n: int) -> str:
    """``n`` names, separated by commas."""
    return ", ".join(f"{letter}{i}" for i in range(n))


def per_source(n: int) -> str:
    """No stack: a norm, a sum and a product for every source."""
    each = "".join(
        f"""
    k{i} = {NORM} (v{i}, scaled)
    l{i} = ReduceSum <keepdims = 1> (k{i}, last)"""
        for i in range(n)
    )
    products = "".join(f"\n    m{i} = Mul (a{i}, v{i})" for i in range(n))
    return f"""{WEIGHT}{each}
    logits = Concat <axis = -1> ({names("l", n)})
    alpha = Softmax <axis = -1> (logits)
    {names("a", n)} = Split <axis = -1, num_outputs = {n}> (alpha){products}
    h = Sum ({names("m", n)})"""


def newest_apart(n: int) -> str:
    """All sources but the newest stacked: a stack that the sites of a block share, as equal nodes are merged."""
    return f"""{WEIGHT}{STACK.format(sources=names("v", n - 1), n=n - 1)}
    k = {NORM} (v, scaled)
    stack_logits = ReduceSum <keepdims = 0> (k, last)
    newest_k = {NORM} (v{n - 1}, scaled)
    newest_logit = ReduceSum <keepdims = 1> (newest_k, last)
    logits = Concat <axis = -1> (stack_logits, newest_logit)
    alpha = Softmax <axis = -1> (logits)
    split = Constant <value_ints = [{n - 1}, 1]> ()
    stack_alpha, newest_alpha = Split <axis = -1> (alpha, split)
    row = Unsqueeze (stack_alpha, before_last)
    mixed = MatMul (row, v)
    from_stack = Squeeze (mixed, before_last)
    from_newest = Mul (newest_alpha, v{n - 1})
    h = Add (from_stack, from_newest)"""


def product_and_sum(n: int) -> str:
    """The stack times its weights, and a sum, in place of the MatMul."""
    return f"""{WEIGHT}{STACK.format(sources=names("v", n), n=n)}
    k = {NORM} (v, scaled)
    logits = ReduceSum <keepdims = 1> (k, last)
    alpha = Softmax <axis = -2> (logits)
    weighted = Mul (v, alpha)
    h = ReduceSum <keepdims = 0> (weighted, before_last)"""


def logits_by_matmul(n: int) -> str:
    """The dot products as a product of matrices, and the norms of the sources apart."""
    return f"""{WEIGHT}{STACK.format(sources=names("v", n), n=n)}
    dot = MatMul (v, scaled)
    squares = Mul (v, v)
    mean = ReduceMean <keepdims = 0> (squares, last)
    eps_given = Constant <value_float: float = @eps> ()
    mean_eps = Add (mean, eps_given)
    rms = Sqrt (mean_eps)
    logits = Div (dot, rms)
    alpha = Softmax <axis = -1> (logits)
    row = Unsqueeze (alpha, before_last)
    mixed = MatMul (row, v)
    h = Squeeze (mixed, before_last)"""


def attention(n: int) -> str:
    """The operator ``Attention`` of opset 23 over the sources, every token a sequence of its own."""
    return f"""{WEIGHT}
    width = Shape (query)
    counts = Constant <value_ints = [-1, {n}]> ()
    shape = Concat <axis = 0> (counts, width)
    side_by_side = Concat <axis = -1> ({names("v", n)})
    v = Reshape (side_by_side, shape)
    one = Constant <value_float = 1.0> ()
    ones = Expand (one, width)
    k = {NORM} (v, ones)
    tokens = Shape <start = 0, end = 1> (v)
    single = Constant <value_ints = [1]> ()
    query_shape = Concat <axis = 0> (tokens, single, width)
    q = Expand (scaled, query_shape)
    y = Attention <q_num_heads = 1, kv_num_heads = 1, scale = 1.0> (q, k, v)
    shape_out = Shape (v0)
    h = Reshape (y, shape_out)"""


FORMULATIONS: dict[str, Callable[[int], str]] = {
    "per source": per_source,
    "newest apart": newest_apart,
    "product and sum": product_and_sum,
    "logits by MatMul": logits_by_matmul,
    "Attention": attention,
}


QUERIES = """
    rows = Constant <value_ints = [{reads}, -1]> ()
    query_by_query = Concat <axis = 0> ({queries})
    gain_by_gain = Concat <axis = 0> ({gains})
    query_rows = Reshape (query_by_query, rows)
    gain_rows = Reshape (gain_by_gain, rows)
    w = Mul (query_rows, gain_rows)
    scale_given = Constant <value_float: float = @scale> ()
    scaled = Mul (w, scale_given)
    columns = Transpose <perm = [1, 0]> (scaled)
    last = Constant <value_ints = [-1]> ()
    before_last = Constant <value_ints = [-2]> ()
    eps_given = Constant <value_float: float = @eps> ()
    one = Constant <value_float = 1.0> ()
    width = Shape <start = -1> (v0)
    ones = Expand (one, width)
    side_by_side_again = Constant <value_ints = [0, 0, -1]> ()"""
SOFTMAX = """
    logits = Transpose <perm = [0, 1, 3, 2]> (logits_by_block)
    log_sums = ReduceLogSumExp <keepdims = 0> (logits, last)
    {log_sums} = Split <axis = -1, num_outputs = {reads}> (log_sums)
    alpha = Softmax <axis = -1> (logits)"""
SPLIT = """
    mixed = MatMul (alpha, v)
    mixed_side_by_side = Reshape (mixed, side_by_side_again)
    {mixed} = Split <axis = -1, num_outputs = {reads}> (mixed_side_by_side)"""


def _attend(n: int, reads: int, logits: str, mix: str = SPLIT) -> str:
    """A body of ``AttendBlocks`` over several blocks from what computes ``logits_by_block`` ``[B, T, n, S]``."""
    text = QUERIES + STACK.replace("{sources}", "{blocks}") + logits + SOFTMAX + mix
    lists = {"blocks": names("v", n), "queries": names("query", reads), "gains": names("gain", reads)}
    return text.format(n=n, reads=reads, mixed=names("m", reads), log_sums=names("l", reads), **lists)


KEYS = f"""
    k = {NORM} (v, ones)
    logits_by_block = MatMul (k, columns)"""


def keys_per_block(n: int, reads: int) -> str:
    """A norm for every block, which all calls share, as equal nodes are merged."""
    each = "".join(
        f"""
    k{i} = {NORM} (v{i}, ones)
    logits{i} = MatMul (k{i}, columns)"""
        for i in range(n)
    )
    joined = f"""
    logits_side_by_side = Concat <axis = -1> ({names("logits", n)})
    logits_by_block = Reshape (logits_side_by_side, shape)"""
    return _attend(n, reads, each + joined)


def norms_apart(n: int, reads: int) -> str:
    """The dot products from the blocks as they are, divided by their norms."""
    return _attend(
        n,
        reads,
        """
    dots = MatMul (v, columns)
    squares = ReduceSumSquare <keepdims = 1> (v, last)
    count = CastLike (width, squares)
    mean = Div (squares, count)
    mean_eps = Add (mean, eps_given)
    rms = Sqrt (mean_eps)
    logits_by_block = Div (dots, rms)""",
    )


def matmul_per_read(n: int, reads: int) -> str:
    """A product with the stack for every read, whose result is then not copied."""
    each = "".join(
        f"""
    row{s} = Unsqueeze (alpha{s}, before_last)
    mixed{s} = MatMul (row{s}, v)
    m{s} = Squeeze (mixed{s}, before_last)"""
        for s in range(reads)
    )
    split = f"""
    alpha_side_by_side = Reshape (alpha, side_by_side_again)
    {names("alpha", reads)} = Split <axis = -1, num_outputs = {reads}> (alpha_side_by_side)"""
    return _attend(n, reads, KEYS, split + each)


PRODUCTS = f"""{WEIGHT}
    k = {NORM} (p, scaled)
    logit = ReduceSum <keepdims = 1> (k, last)"""
STEP = """
    excess = Sub (logit, l)
    a = Sigmoid (excess)
    difference = Sub (p, m)
    change = Mul (difference, a)
    h = Add (m, change)"""


def merge_logit_by_matmul() -> str:
    """The dot product as a product of matrices, and the norm apart."""
    return f"""{WEIGHT}
    column = Unsqueeze (scaled, last)
    dot = MatMul (p, column)
    squares = ReduceSumSquare <keepdims = 1> (p, last)
    width = Shape (query)
    count = CastLike (width, squares)
    mean = Div (squares, count)
    eps_given = Constant <value_float: float = @eps> ()
    mean_eps = Add (mean, eps_given)
    rms = Sqrt (mean_eps)
    logit = Div (dot, rms){STEP}"""


def merge_by_softmax() -> str:
    """Softmax over the log-sum and the logit, and a product with the stack of the two."""
    return f"""{PRODUCTS}
    two = Concat <axis = -1> (l, logit)
    alpha = Softmax <axis = -1> (two)
    row = Unsqueeze (alpha, before_last){STACK.format(sources="m, p", n=2)}
    mixed = MatMul (row, v)
    h = Squeeze (mixed, before_last)"""


def merge_by_two_products() -> str:
    """``(1 - a) * m + a * p``."""
    return f"""{PRODUCTS}
    excess = Sub (logit, l)
    a = Sigmoid (excess)
    negative = Neg (excess)
    rest = Sigmoid (negative)
    of_p = Mul (p, a)
    of_m = Mul (m, rest)
    h = Add (of_m, of_p)"""


TWO_PHASE: dict[str, tuple[Callable[[int, int], str] | None, Callable[[], str] | None]] = {
    "two_phase: keys per block": (keys_per_block, None),
    "two_phase: norms apart": (norms_apart, None),
    "two_phase: MatMul per read": (matmul_per_read, None),
    "two_phase: merge, logit by MatMul": (None, merge_logit_by_matmul),
    "two_phase: merge, by softmax": (None, merge_by_softmax),
    "two_phase: merge, two products": (None, merge_by_two_products),
}


def rewrite_functions(model: ir.Model, body: Callable[[int], str]) -> None:
    """Replace the body of every ``BlockAttnRes`` of ``model``, of float32 sources ``[B, T, D]``."""
    for function in list(model.functions.values()):
        _replace(model, function, body(len(function.inputs) - 2))


def rewrite_phases(model: ir.Model, attend: Callable[[int, int], str] | None, merge: Callable[[], str] | None) -> None:
    """Replace the bodies of the two phases in ``model``, where there is something to mix or to merge."""
    for function in list(model.functions.values()):
        reads = len(function.outputs) // 2
        blocks = len(function.inputs) - 2 * reads
        if function.name == "AttendBlocks" and attend is not None and blocks > 1:
            _replace(model, function, attend(blocks, reads))
        elif function.name == "MergePartial" and merge is not None and len(function.inputs) == len("mlp") + 2:
            _replace(model, function, merge())


def _replace(model: ir.Model, function: ir.Function, body: str) -> None:
    attributes, inputs, outputs = (
        ", ".join(texts)
        for texts in (
            function.attributes,
            [str(value.name) for value in function.inputs],
            [str(value.name) for value in function.outputs],
        )
    )
    text = (
        f'<opset_import: ["" : 23], domain: "{function.domain}">\n'
        f"{function.name} <{attributes}> ({inputs}) => ({outputs}) {{{body}\n}}"
    )
    model.functions[function.identifier()] = ir.serde.deserialize_function(parser.parse_function(text))
