"""Ways to write a whole site in ONNX, for ``benchmarks/onnx.py`` to compare with the one that the package writes.

With ``sites="whole"`` the package concatenates all sources, and does everything once on the stack. Each of
``FORMULATIONS`` is another body of the function ``BlockAttnRes`` over n sources ``v0 ... [B, T, D]``, in ONNX's textual
form.
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


def rewrite_functions(model: ir.Model, body: Callable[[int], str]) -> None:
    """Replace the body of every ``BlockAttnRes`` of ``model``, of float32 sources ``[B, T, D]``."""
    for function in list(model.functions.values()):
        _replace(model, function, body(len(function.inputs) - 2))


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
