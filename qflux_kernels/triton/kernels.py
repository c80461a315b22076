"""Triton kernels over pairs: each owner (a row or a key) gathers a sum over the sources it meets.

A program owns a block of rows or of keys and walks over its sources, keys or rows, in tiles, so
that every sum has one writer and a fixed order, and no pair is ever stored. Tensors are contiguous;
positions are 32-bit, which the caller guarantees, and offsets 64-bit. Triton passes a Python float
as float32: numbers that must be exact arrive in tensors or as constants. Loops are written with
`while` because the interpreter of Triton 3.6 takes no tensors in `range` under NumPy 2.4.
"""

import torch
import triton
import triton.language as tl

# Owners of one program, and sources in one of its tiles: eight pairs for each of 128 threads, or
# two where each pair has a sum for every column of a value. More would not fit the registers.
TILE = 32
VALUE_TILE = 16
# Sources whose sums are taken plainly, before they join a compensated total.
CHUNK = 256
# Rows of one program of the thresholds, each of which reads all keys in front of its rows.
THRESHOLD_ROWS = 128


# The scores of `csrc/math/score.h`, by their names in `schema.SCORES`. The first functions
# make queries from whole tensors and pull their gradients back; kernels call the rest.


def query(score, states, coefficient):
    """The queries `(B, S, 2)` whose inner products with the keys are scored."""
    if score == "inverse_gate":
        return states + coefficient[:, None, None] * _turned(states)
    if score == "sparsemax":
        return coefficient[:, None, None] * states
    return states / 2


def query_vjp(score, grad, coefficient):
    """The gradient of the states from that of the queries."""
    if score == "inverse_gate":
        return grad - coefficient[:, None, None] * _turned(grad)
    if score == "sparsemax":
        return coefficient[:, None, None] * grad
    return grad / 2


def coefficient_vjp(score, grad, states):
    """Each row's share `(B, S)` in the gradient of the coefficient; None: the query has no part."""
    if score == "inverse_gate":
        return (grad * _turned(states)).sum(-1)
    if score == "sparsemax":
        return (grad * states).sum(-1)
    return None


def _turned(points):
    x, y = points.unbind(-1)
    return torch.stack((y, -x), -1)


@triton.jit
def _inner_product(qx, qy, kx, ky, SCORE: tl.constexpr):
    # Fused on purpose: all passes must round alike, or they would disagree on kept pairs.
    if SCORE == "inverse_gate" or SCORE == "sparsemax":
        return tl.fma(qx, kx, tl.fma(qy, ky, 0.0))
    return tl.fma(qx, kx, tl.fma(qy, ky, 0.5))


@triton.jit
def _weigh(p, limit, rest, visible, eps: tl.constexpr, SCORE: tl.constexpr):
    """Weight and decision of visible pairs; a comparison with NaN never drops one.

    `rest` is what a limit lost by rounding, where many weights share it.
    """
    if SCORE == "inverse_gate":
        gate = 1.0 / (eps + tl.abs(p))
        # The zero is NaN for an infinite p, so that what is not finite is never dropped.
        kept = visible & ~(tl.fma(p, 0.0, gate) <= limit)
        weight = p * gate
    elif SCORE == "sparsemax":
        kept = visible & ~(p <= limit)
        weight = (p - limit) - rest
        # A backward has no rest: products beyond the precision of a weight leave a limit far below
        # a pair, whose weight is one at most.
        weight = tl.where(weight > 1.0, 1.0, weight)
    else:
        kept = visible & ~(p < limit)
        weight = p
        if SCORE == "soft_threshold":
            weight = p - limit
    return tl.where(kept, weight, 0.0), kept


@triton.jit
def _weight_vjp(p, grad, eps: tl.constexpr, SCORE: tl.constexpr):
    """The gradient of the inner product of a kept pair from that of its weight."""
    if SCORE == "inverse_gate":
        gate = 1.0 / (eps + tl.abs(p))
        grad = grad * (eps * gate * gate)
    return grad


@triton.jit
def _load_points(points, at, inside):
    offset = 2 * at.to(tl.int64)
    x = tl.load(points + offset, mask=inside, other=0.0)
    y = tl.load(points + offset + 1, mask=inside, other=0.0)
    return x, y


@triton.jit
def _ends(lengths, b, rows, keys):
    """How many rows and keys sequence `b` has before its padding."""
    row_end = tl.cast(rows, tl.int32)
    key_end = tl.cast(keys, tl.int32)
    if lengths is not None:
        row_end = tl.load(lengths + b)
        key_end = row_end
    return row_end, key_end


@triton.jit
def _owner_block(batch, owners, columns, REVERSED: tl.constexpr, BLOCK: tl.constexpr):
    """Sequence, first owner and column block of this program, the heaviest owners first."""
    program = tl.program_id(0)
    b = (program % batch).to(tl.int64)
    column_block = program // batch % columns
    block = program // batch // columns
    if REVERSED:
        block = tl.cdiv(owners, BLOCK) - 1 - block
    return b, block * BLOCK, column_block


@triton.jit
def _met(
    first, row_end, key_end, shift, CAUSAL: tl.constexpr, BY_KEY: tl.constexpr, OWNERS: tl.constexpr
):
    """The sources that any owner of a block meets."""
    begin = tl.zeros((), tl.int32)
    if BY_KEY:
        end = tl.where(first < key_end, row_end, 0)
        if CAUSAL:
            begin = tl.maximum(first - shift, 0)
    else:
        end = tl.where(first < row_end, key_end, 0)
        if CAUSAL:
            end = tl.minimum(end, tl.minimum(first + OWNERS, row_end) + shift)
    return begin, end


@triton.jit
def _visible(row, key, row_end, key_end, shift, CAUSAL: tl.constexpr):
    visible = (row < row_end) & (key < key_end)
    if CAUSAL:
        visible = visible & (key <= row + shift)
    return visible


@triton.jit
def _add(total, error, part):
    """Continue a sum so that its error does not grow with the number of parts."""
    after = total + part
    shadow = after - total
    error += (total - (after - shadow)) + (part - shadow)
    return after, error


@triton.jit
def _settled(total, error):
    # An overflow makes the error term NaN; the sum itself is then the answer.
    return tl.where(error == error, total + error, total)


@triton.jit
def thresholds(
    states,  # (batch, rows, 2)
    keys,  # (batch, num_keys, 2)
    sigma,  # (batch,)
    lengths,  # (batch,) int32 or None
    out,  # (batch, rows)
    batch,
    rows,
    num_keys,
    eps: tl.constexpr,
    CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr,  # the window is the whole sequence
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """tau of each row from the moments of its keys, in float64 and relative to the first key."""
    b, first, _ = _owner_block(batch, rows, 1, CAUSAL, ROWS)
    row_end, key_end = _ends(lengths, b, rows, num_keys)
    shift = num_keys - rows
    states += b * rows * 2
    keys += b * num_keys * 2
    row = first + tl.arange(0, ROWS)
    x, y = _load_points(states, row, row < row_end)
    x, y = x.to(tl.float64), y.to(tl.float64)
    origin_x = tl.load(keys).to(tl.float64)
    origin_y = tl.load(keys + 1).to(tl.float64)

    # Keys that all rows of the block share are summed once, in as many lanes as a tile is wide.
    shared = key_end
    end = key_end
    if not WHOLE:
        shared = tl.minimum(tl.maximum(first + shift + 1, 0), key_end)
        end = tl.minimum(first + ROWS + shift, key_end)
    lane = tl.arange(0, KEYS)
    lanes_x = tl.zeros([KEYS], tl.float64)
    lanes_y = tl.zeros([KEYS], tl.float64)
    lanes_xx = tl.zeros([KEYS], tl.float64)
    lanes_xy = tl.zeros([KEYS], tl.float64)
    lanes_yy = tl.zeros([KEYS], tl.float64)
    start = tl.zeros((), tl.int32)
    while start < shared:
        inside = start + lane < shared
        kx, ky = _load_points(keys, start + lane, inside)
        dx = tl.where(inside, kx.to(tl.float64) - origin_x, 0.0)
        dy = tl.where(inside, ky.to(tl.float64) - origin_y, 0.0)
        lanes_x += dx
        lanes_y += dy
        lanes_xx += dx * dx
        lanes_xy += dx * dy
        lanes_yy += dy * dy
        start += KEYS
    zero = tl.zeros([ROWS], tl.float64)
    sum_x = zero + tl.sum(lanes_x, 0)
    sum_y = zero + tl.sum(lanes_y, 0)
    sum_xx = zero + tl.sum(lanes_xx, 0)
    sum_xy = zero + tl.sum(lanes_xy, 0)
    sum_yy = zero + tl.sum(lanes_yy, 0)
    start = shared
    while start < end:
        key = start + lane
        kx, ky = _load_points(keys, key, key < end)
        window = (key[None, :] < end) & (key[None, :] <= row[:, None] + shift)
        dx = tl.where(window, kx.to(tl.float64)[None, :] - origin_x, 0.0)
        dy = tl.where(window, ky.to(tl.float64)[None, :] - origin_y, 0.0)
        sum_x += tl.sum(dx, 1)
        sum_y += tl.sum(dy, 1)
        sum_xx += tl.sum(dx * dx, 1)
        sum_xy += tl.sum(dx * dy, 1)
        sum_yy += tl.sum(dy * dy, 1)

        start += KEYS
    visible = tl.where(row < row_end, key_end, 0)
    if CAUSAL:
        visible = tl.minimum(visible, row + shift + 1)
    count = tl.where(visible > 0, visible, 1)
    if WHOLE:
        count = tl.where(visible > 0, key_end, 1)
    scale = 1.0 / count.to(tl.float64)
    mean_x, mean_y = sum_x * scale, sum_y * scale
    cov_xx = tl.fma(-mean_x, mean_x, sum_xx * scale)
    cov_xy = tl.fma(-mean_x, mean_y, sum_xy * scale)
    cov_yy = tl.fma(-mean_y, mean_y, sum_yy * scale)
    mean = (x * (origin_x + mean_x) + y * (origin_y + mean_y) + 1.0) / 2.0
    variance = (x * x * cov_xx + 2.0 * x * y * cov_xy + y * y * cov_yy) / 4.0
    variance = tl.where(variance < 0.0, 0.0, variance)
    # An infinite state leaves no score defined, even where its infinities agree.
    undefined = (x - x) + (y - y)
    tau = mean + tl.load(sigma + b).to(tl.float64) * tl.sqrt(variance + eps) + undefined
    tau = tl.where(visible > 0, tau, 0.0)
    tl.store(out + b * rows + row, tau.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def mass_thresholds(
    queries,  # (batch, rows, 2)
    keys,  # (batch, num_keys, 2)
    lengths,  # (batch,) int32 or None
    out,  # (batch, rows)
    rest,  # (batch, rows): what tau loses when it is rounded
    batch,
    rows,
    num_keys,
    tolerance: tl.constexpr,
    SCORE: tl.constexpr,
    CAUSAL: tl.constexpr,
    OWNERS: tl.constexpr,
    SOURCES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """tau of rows whose weights sum to one, by Newton's steps from the largest pair less one.

    Each step drops pairs, and once it drops none it is exact (`csrc/math/mass.h`).
    """
    b, first, _ = _owner_block(batch, rows, 1, CAUSAL, OWNERS)
    row_end, key_end = _ends(lengths, b, rows, num_keys)
    shift = num_keys - rows
    queries += b * rows * 2
    keys += b * num_keys * 2
    dtype: tl.constexpr = out.dtype.element_ty
    row = first + tl.arange(0, OWNERS)
    qx, qy = _load_points(queries, row[:, None], (row < rows)[:, None])
    begin, end = _met(first, row_end, key_end, shift, CAUSAL, False, OWNERS)

    largest = tl.full([OWNERS, SOURCES], -float("inf"), dtype)
    poison = tl.zeros([OWNERS, SOURCES], dtype)
    start = begin
    while start < end:
        key = start + tl.arange(0, SOURCES)
        kx, ky = _load_points(keys, key[None, :], (key < end)[None, :])
        visible = _visible(row[:, None], key[None, :], row_end, key_end, shift, CAUSAL)
        p = _inner_product(qx, qy, kx, ky, SCORE)
        largest = tl.where(visible & (largest < p), p, largest)
        # What is not finite makes the row undefined.
        poison = tl.where(visible, tl.fma(p, 0.0, poison), poison)
        start += SOURCES
    seen = tl.where(row < row_end, key_end, 0)
    if CAUSAL:
        seen = tl.minimum(seen, row + shift + 1)
    # Less one: a lower bound. Less more than one where rounding would leave nothing of it.
    most = tl.max(largest, 1)
    below = most - tl.maximum(tl.abs(most) * tolerance, 1.0) + tl.sum(poison, 1)
    tau = tl.where(seen > 0, below, 0.0)
    lost = tl.zeros([OWNERS], dtype)
    before = tl.full([OWNERS], 2147483647, tl.int32)
    active = (seen > 0) & (tau == tau)
    going = tl.max(active.to(tl.int32), 0)
    while going > 0:
        mass = tl.zeros([OWNERS], tl.float64)
        count = tl.zeros([OWNERS], tl.int32)
        chunk = begin
        while chunk < end:
            part = tl.zeros([OWNERS, SOURCES], dtype)
            part_count = tl.zeros([OWNERS, SOURCES], tl.int32)
            start = chunk
            while start < tl.minimum(chunk + CHUNK, end):
                key = start + tl.arange(0, SOURCES)
                kx, ky = _load_points(keys, key[None, :], (key < end)[None, :])
                visible = _visible(row[:, None], key[None, :], row_end, key_end, shift, CAUSAL)
                p = _inner_product(qx, qy, kx, ky, SCORE)
                weight, kept = _weigh(p, tau[:, None], 0.0, visible, 0.0, SCORE)
                part += weight
                part_count += kept.to(tl.int32)
                start += SOURCES
            mass += tl.sum(part, 1).to(tl.float64)
            count += tl.sum(part_count, 1)
            chunk += CHUNK
        excess = mass - 1.0
        step = (excess / tl.maximum(count, 1).to(tl.float64)).to(dtype)
        # Where rounding is coarser than a weight a step may leave nothing above tau: then all of it
        # is the rest. A row that is done stays as it is: how long others take must not show.
        moves = tau + step < most
        moved = tl.where(moves, tau + step, tau)
        lost = tl.where(active, step - (moved - tau), lost)
        tau = tl.where(active, moved, tau)
        active = active & moves & (tl.abs(excess) > tolerance) & (count < before)
        before = count
        going = tl.max(active.to(tl.int32), 0)
    tl.store(out + b * rows + row, tau, mask=row < rows)
    tl.store(rest + b * rows + row, lost, mask=row < rows)


@triton.jit
def gather_values(
    queries,  # (batch, rows, 2)
    keys,  # (batch, num_keys, 2)
    limit,  # (batch, rows): tau or the minimal gate
    rest,  # (batch, rows): what tau lost by rounding; by row, or None
    values,  # of the sources, (batch, sources, value_dim)
    scale,  # (batch, rows); by row only
    lengths,  # (batch,) int32 or None
    out,  # (batch, owners, value_dim)
    strength,  # (batch, rows); by row only
    degree,  # (batch, rows) int32; by row only
    batch,
    rows,
    num_keys,
    value_dim,
    eps: tl.constexpr,
    SCORE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BY_KEY: tl.constexpr,
    ALONE: tl.constexpr,  # by row, and the values are the keys
    OWNERS: tl.constexpr,
    SOURCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sums of weighted values: the context by row, the gradient of the values by key.

    By row the sums are multiplied by `scale`, and come with strength and degree.
    """
    owners, sources = rows, num_keys
    if BY_KEY:
        owners, sources = num_keys, rows
    b, first, column_block = _owner_block(
        batch, owners, tl.cdiv(value_dim, COLUMNS), CAUSAL and not BY_KEY, OWNERS
    )
    row_end, key_end = _ends(lengths, b, rows, num_keys)
    shift = num_keys - rows
    queries += b * rows * 2
    keys += b * num_keys * 2
    limit += b * rows
    values += b * sources * value_dim
    dtype: tl.constexpr = out.dtype.element_ty

    owner = first + tl.arange(0, OWNERS)
    inside = owner < owners
    if BY_KEY:
        kx, ky = _load_points(keys, owner[:, None], inside[:, None])
    else:
        qx, qy = _load_points(queries, owner[:, None], inside[:, None])
        bound = tl.load(limit + owner[:, None], mask=inside[:, None], other=0.0)
    lost = 0.0
    if rest is not None:
        lost = tl.load(rest + b * rows + owner[:, None], mask=inside[:, None], other=0.0)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)

    if ALONE:
        total_x = tl.zeros([OWNERS], dtype)
        total_y = tl.zeros([OWNERS], dtype)
        error_x = tl.zeros([OWNERS], dtype)
        error_y = tl.zeros([OWNERS], dtype)
    else:
        total = tl.zeros([OWNERS, COLUMNS], dtype)
        error = tl.zeros([OWNERS, COLUMNS], dtype)
    total_weight = tl.zeros([OWNERS], dtype)
    error_weight = tl.zeros([OWNERS], dtype)
    total_kept = tl.zeros([OWNERS], tl.int32)

    begin, end = _met(first, row_end, key_end, shift, CAUSAL, BY_KEY, OWNERS)
    chunk = begin
    while chunk < end:
        # Summed lane by lane, and across lanes once for each chunk.
        if ALONE:
            part_x = tl.zeros([OWNERS, SOURCES], dtype)
            part_y = tl.zeros([OWNERS, SOURCES], dtype)
        else:
            part = tl.zeros([OWNERS, SOURCES, COLUMNS], dtype)
        part_weight = tl.zeros([OWNERS, SOURCES], dtype)
        part_kept = tl.zeros([OWNERS, SOURCES], tl.int32)
        start = chunk
        while start < tl.minimum(chunk + CHUNK, end):
            source = start + tl.arange(0, SOURCES)
            here = source < end
            if BY_KEY:
                qx, qy = _load_points(queries, source[None, :], here[None, :])
                bound = tl.load(limit + source[None, :], mask=here[None, :], other=0.0)
                visible = _visible(source[None, :], owner[:, None], row_end, key_end, shift, CAUSAL)
            else:
                kx, ky = _load_points(keys, source[None, :], here[None, :])
                visible = _visible(owner[:, None], source[None, :], row_end, key_end, shift, CAUSAL)
            p = _inner_product(qx, qy, kx, ky, SCORE)
            weight, kept = _weigh(p, bound, lost, visible, eps, SCORE)
            # A zero weight would not keep out a value that is not finite. A dropped value must
            # show all the same; a gradient only reaches what was kept.
            counted = kept if BY_KEY else visible
            if ALONE:
                part_x = tl.fma(weight, tl.where(counted, kx, 0.0), part_x)
                part_y = tl.fma(weight, tl.where(counted, ky, 0.0), part_y)
            else:
                offset = source.to(tl.int64)[:, None] * value_dim + column[None, :]
                value = tl.load(
                    values + offset, mask=here[:, None] & (column < value_dim)[None, :], other=0.0
                )
                value = tl.where(counted[:, :, None], value[None, :, :], 0.0)
                part = tl.fma(weight[:, :, None], value, part)
            if not BY_KEY:
                part_weight += weight
                part_kept += kept.to(tl.int32)
            start += SOURCES
        if ALONE:
            total_x, error_x = _add(total_x, error_x, tl.sum(part_x, 1))
            total_y, error_y = _add(total_y, error_y, tl.sum(part_y, 1))
        else:
            total, error = _add(total, error, tl.sum(part, 1))
        if not BY_KEY:
            total_weight, error_weight = _add(total_weight, error_weight, tl.sum(part_weight, 1))
            total_kept += tl.sum(part_kept, 1)

        chunk += CHUNK
    place = b * owners + owner
    factor = 1.0
    if not BY_KEY:
        factor = tl.load(scale + place, mask=inside, other=0.0)
        head = inside & (column_block == 0)
        tl.store(strength + place, factor * _settled(total_weight, error_weight), mask=head)
        tl.store(degree + place, total_kept, mask=head)
    if ALONE:
        tl.store(out + place * 2, factor * _settled(total_x, error_x), mask=inside)
        tl.store(out + place * 2 + 1, factor * _settled(total_y, error_y), mask=inside)
    else:
        result = _settled(total, error)
        if not BY_KEY:
            result = factor[:, None] * result
        tl.store(
            out + place[:, None] * value_dim + column[None, :],
            result,
            mask=inside[:, None] & (column < value_dim)[None, :],
        )


@triton.jit
def gather_points(
    queries,  # (batch, rows, 2)
    keys,  # (batch, num_keys, 2)
    limit,  # (batch, rows)
    values,  # (batch, num_keys, value_dim)
    grad_context,  # (batch, rows, value_dim), reduction applied
    grad_strength,  # (batch, rows), reduction applied, or None
    lengths,  # (batch,) int32 or None
    out,  # (batch, owners, 2)
    # (batch, rows), by row, or None: gradient of the threshold; of a mass less the mean of what its
    # weights are worth, which by key takes the place of grad_strength.
    limit_out,
    batch,
    rows,
    num_keys,
    value_dim,
    eps: tl.constexpr,
    SCORE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BY_KEY: tl.constexpr,
    ALONE: tl.constexpr,  # the values are the keys: by key, their gradient is added
    OWNERS: tl.constexpr,
    SOURCES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradient of the queries by row, of the keys by key; weights are recomputed."""
    owners = rows
    if BY_KEY:
        owners = num_keys
    b, first, _ = _owner_block(batch, owners, 1, CAUSAL and not BY_KEY, OWNERS)
    row_end, key_end = _ends(lengths, b, rows, num_keys)
    shift = num_keys - rows
    queries += b * rows * 2
    keys += b * num_keys * 2
    limit += b * rows
    values += b * num_keys * value_dim
    grad_context += b * rows * value_dim
    dtype: tl.constexpr = out.dtype.element_ty
    MASS: tl.constexpr = SCORE == "sparsemax" and not BY_KEY

    owner = first + tl.arange(0, OWNERS)
    inside = owner < owners
    total_x = tl.zeros([OWNERS], dtype)
    total_y = tl.zeros([OWNERS], dtype)
    error_x = tl.zeros([OWNERS], dtype)
    error_y = tl.zeros([OWNERS], dtype)
    # Of a mass, sums over the kept keys.
    total_kept = tl.zeros([OWNERS], tl.int32)
    total_kx = tl.zeros([OWNERS], dtype)
    total_ky = tl.zeros([OWNERS], dtype)
    error_kx = tl.zeros([OWNERS], dtype)
    error_ky = tl.zeros([OWNERS], dtype)
    total_limit = tl.zeros([OWNERS], dtype)
    error_limit = tl.zeros([OWNERS], dtype)

    begin, end = _met(first, row_end, key_end, shift, CAUSAL, BY_KEY, OWNERS)
    chunk = begin
    while chunk < end:
        part_x = tl.zeros([OWNERS, SOURCES], dtype)
        part_y = tl.zeros([OWNERS, SOURCES], dtype)
        part_limit = tl.zeros([OWNERS, SOURCES], dtype)
        part_kept = tl.zeros([OWNERS, SOURCES], tl.int32)
        part_kx = tl.zeros([OWNERS, SOURCES], dtype)
        part_ky = tl.zeros([OWNERS, SOURCES], dtype)
        start = chunk
        while start < tl.minimum(chunk + CHUNK, end):
            source = start + tl.arange(0, SOURCES)
            if BY_KEY:
                row, key = source[None, :], owner[:, None]
                row_here, key_here = (source < end)[None, :], inside[:, None]
            else:
                row, key = owner[:, None], source[None, :]
                row_here, key_here = inside[:, None], (source < end)[None, :]
            qx, qy = _load_points(queries, row, row_here)
            kx, ky = _load_points(keys, key, key_here)
            bound = tl.load(limit + row, mask=row_here, other=0.0)
            visible = _visible(row, key, row_end, key_end, shift, CAUSAL)
            p = _inner_product(qx, qy, kx, ky, SCORE)
            weight, kept = _weigh(p, bound, 0.0, visible, eps, SCORE)

            grad = tl.zeros([OWNERS, SOURCES], dtype)
            if grad_strength is not None:
                grad += tl.load(grad_strength + b * rows + row, mask=row_here, other=0.0)
            if ALONE:
                gx, gy = _load_points(grad_context, row, row_here)
                grad = tl.fma(gx, kx, tl.fma(gy, ky, grad))
            else:
                column = tl.zeros((), tl.int32)
                while column < value_dim:
                    g = tl.load(
                        grad_context + row.to(tl.int64) * value_dim + column,
                        mask=row_here,
                        other=0.0,
                    )
                    v = tl.load(
                        values + key.to(tl.int64) * value_dim + column, mask=key_here, other=0.0
                    )
                    grad = tl.fma(g, v, grad)
                    column += 1
            grad = _weight_vjp(p, grad, eps, SCORE)
            # Zeros on both sides: an infinity or NaN of a pair that was dropped must not enter.
            grad = tl.where(kept, grad, 0.0)
            if BY_KEY:
                part_x = tl.fma(grad, tl.where(kept, qx, 0.0), part_x)
                part_y = tl.fma(grad, tl.where(kept, qy, 0.0), part_y)
                if ALONE:
                    part_x = tl.fma(weight, tl.where(kept, gx, 0.0), part_x)
                    part_y = tl.fma(weight, tl.where(kept, gy, 0.0), part_y)
            else:
                part_x = tl.fma(grad, tl.where(kept, kx, 0.0), part_x)
                part_y = tl.fma(grad, tl.where(kept, ky, 0.0), part_y)
                if limit_out is not None:
                    part_limit -= grad
                if MASS:
                    part_kept += kept.to(tl.int32)
                    part_kx += tl.where(kept, kx, 0.0)
                    part_ky += tl.where(kept, ky, 0.0)
            start += SOURCES
        total_x, error_x = _add(total_x, error_x, tl.sum(part_x, 1))
        total_y, error_y = _add(total_y, error_y, tl.sum(part_y, 1))
        if limit_out is not None:
            total_limit, error_limit = _add(total_limit, error_limit, tl.sum(part_limit, 1))
        if MASS:
            total_kept += tl.sum(part_kept, 1)
            total_kx, error_kx = _add(total_kx, error_kx, tl.sum(part_kx, 1))
            total_ky, error_ky = _add(total_ky, error_ky, tl.sum(part_ky, 1))

        chunk += CHUNK
    x, y = _settled(total_x, error_x), _settled(total_y, error_y)
    of_limit = _settled(total_limit, error_limit)
    if MASS:
        of_limit = of_limit / tl.maximum(total_kept, 1).to(dtype)
        x = tl.fma(of_limit, _settled(total_kx, error_kx), x)
        y = tl.fma(of_limit, _settled(total_ky, error_ky), y)
    place = (b * owners + owner) * 2
    tl.store(out + place, x, mask=inside)
    tl.store(out + place + 1, y, mask=inside)
    if limit_out is not None:
        tl.store(limit_out + b * rows + owner, of_limit, mask=inside)
