// SPDX-License-Identifier: Apache-2.0
// The kernel that goes on after the sum: adds the residual and normalises each row (RMSNorm). A block takes
// whole rows, so the norm needs no other block.
//
//     h = round(sum + residual);  out = round(round(h / sqrt(mean(h * h) + eps)) * weight)
//
// in fp32 but for the roundings to the type. The squares are added in one order whatever the packets and the
// launch shape: within each 8 bytes in turn; of 1 KB, by 32 lanes 32 bytes each in turn, then halves of the
// lanes; then all KBs by 32 lanes in turn, then halves. nvrar/rms_norm.py is the same in torch.
#pragma once

#include "column.cuh"

namespace nvrar {

inline float add_up_lanes(float value) {
#pragma unroll
    for (int half = 16; half > 0; half /= 2) value = __fadd_rn(value, __shfl_xor_sync(~0u, value, half));
    return value;
}

// The tensor as rows, each cut into the parts of the plan; a row ends within a unit where it must.
template <class Plan, class Packet, class Type>
class Rows {
    using Words = Message<Packet, Type, true>;
    static constexpr int kPerWord = Type::kPerWord;
    static constexpr bool kFetches = Plan::kParts * Packet::kWords <= 8;
    static constexpr u32 kSliceWords = 128;  // that a warp adds up

  public:
    using Payload = typename Packet::Payload;

    explicit Rows(const Args<Plan>& args) : args_(args) {}

    void go_to_row(u32 row) { row_ = row; }

    Payload load(int part, u32 unit, bool live) const {
        return Words::load(args_.in, start(part, unit), live ? row_end() : 0);
    }

    void fetch(u32 unit, bool live) {
        if constexpr (kFetches) {
#pragma unroll
            for (int part = 0; part < Plan::kParts; part++) residual_.value[part] = load_residual(part, unit, live);
        }
    }

    // Adds the residual, and leaves the squares of every word for `normalise`.
    void store(int part, u32 unit, const Payload& sum) const {
        const Payload residual = kFetches ? residual_.get(part) : load_residual(part, unit, true);
        Payload h;
        for_words(part, unit, [&](u64 at, int w) {
            float a[kPerWord], b[kPerWord];
            Type::widen(sum.word[w], a);
            Type::widen(residual.word[w], b);
#pragma unroll
            for (int e = 0; e < kPerWord; e++) a[e] = __fadd_rn(a[e], b[e]);
            h.word[w] = Type::narrow(a);
            Type::widen(h.word[w], a);
            float squares = __fmul_rn(a[0], a[0]);
#pragma unroll
            for (int e = 1; e < kPerWord; e++) squares = __fadd_rn(squares, __fmul_rn(a[e], a[e]));
            word_sums()[(at - row_start()) / 8] = squares;
        });
        Words::store(args_.norm.residual_out, start(part, unit), row_end(), h);
    }

    // 1 / sqrt(mean of squares + eps) of the row, once all threads of the block have stored it.
    float scale() const {
        const u32 words = args_.norm.row_bytes / 8, slices = (words + kSliceWords - 1) / kSliceWords;
        const u32 lane = threadIdx.x % 32;
        for (u32 slice = threadIdx.x / 32; slice < slices; slice += blockDim.x / 32) {
            float total = 0;
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                const u32 at = slice * kSliceWords + 4 * lane + e;
                if (at < words) total = __fadd_rn(total, word_sums()[at]);
            }
            total = add_up_lanes(total);
            if (lane == 0) slice_sums(words)[slice] = total;
        }
        __syncthreads();
        float total = 0;
        for (u32 slice = lane; slice < slices; slice += 32) total = __fadd_rn(total, slice_sums(words)[slice]);
        total = add_up_lanes(total);
        const float mean = __fdiv_rn(total, float(words * kPerWord));
        return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, args_.norm.eps)));
    }

    // Of the units that this thread has stored, and so can read back without a barrier.
    void normalise(int part, u32 unit, float scale) const {
        const Payload h = Words::load(args_.norm.residual_out, start(part, unit), row_end());
        const Payload weight = Words::load(args_.norm.weight, start(part, unit) - row_start(), args_.norm.row_bytes);
        Payload out;
        for_words(part, unit, [&](u64, int w) {
            float a[kPerWord], b[kPerWord];
            Type::widen(h.word[w], a);
#pragma unroll
            for (int e = 0; e < kPerWord; e++) a[e] = __fmul_rn(a[e], scale);
            out.word[w] = Type::narrow(a);
            Type::widen(out.word[w], a);
            Type::widen(weight.word[w], b);
#pragma unroll
            for (int e = 0; e < kPerWord; e++) a[e] = __fmul_rn(a[e], b[e]);
            out.word[w] = Type::narrow(a);
        });
        Words::store(args_.out, start(part, unit), row_end(), out);
    }

    void poison(int part, u32 unit) const {
        Payload value;
        for (u64& word : value.word) word = Type::kPoison;
        Words::store(args_.norm.residual_out, start(part, unit), row_end(), value);
        Words::store(args_.out, start(part, unit), row_end(), value);
    }

  private:
    u64 row_start() const { return u64(row_) * args_.norm.row_bytes; }
    u64 row_end() const { return row_start() + args_.norm.row_bytes; }
    u64 start(int part, u32 unit) const {
        const u32 units = args_.norm.row_units;
        return row_start() + (u64(part) * units + (unit - row_ * units)) * Packet::kDataBytes;
    }

    Payload load_residual(int part, u32 unit, bool live) const {
        return Words::load(args_.norm.residual, start(part, unit), live ? row_end() : 0);
    }

    // The words of a unit that this thread holds: where each is in the tensor, and in the payload.
    template <class Do>
    void for_words(int part, u32 unit, Do&& action) const {
#pragma unroll
        for (int half = 0; half < Words::kHalves; half++) {
            const u64 at = Words::offset(start(part, unit), half);
            if (!Words::holds(half) || at >= row_end()) continue;
#pragma unroll
            for (int w = 0; w < Words::kWords; w++) action(at + 8 * w, half * Words::kWords + w);
        }
    }

    static float* word_sums() {
        extern __shared__ float sums[];
        return sums;
    }
    static float* slice_sums(u32 words) { return word_sums() + words; }

    const Args<Plan>& args_;
    u32 row_ = 0;
    Registers<Payload, kFetches ? Plan::kParts : 1> residual_;
};

template <class Packet, class Type, class Plan>
inline void all_reduce_add_rms_norm(const Args<Plan>& args) {
    using Columns = Column<Plan, Packet, Type, Sum, Rows<Plan, Packet, Type>>;
    const u32 lane = threadIdx.x / Packet::kThreads, lanes = blockDim.x / Packet::kThreads;
    const u32 units = args.norm.row_units;
    // Where blocks put, their threads keep step: the loops' bound is the block's.
    const u32 ahead = Plan::uses(Transport::kPut) ? lane : 0;

    wait_for_previous_kernel();
    Columns column(args);
    const Entry entry = enter(args.control);
    column.enter(entry);
    let_next_kernel_start();
    const auto for_columns = [&](u32 row, auto&& action) {
        column.tensor().go_to_row(row);
#pragma unroll 1
        for (u32 unit = lane; unit - ahead < units; unit += lanes) {
            column.go_to(row * units + unit, (row + 1) * units);
            action(row * units + unit);
        }
    };
    const u32 rows = args.num_units / units;
    u32 row = blockIdx.x;
#pragma unroll 1
    for (; row < rows; row += gridDim.x) for_columns(row, [&](u32) { column.send_input(); });
#pragma unroll 1
    for (row = blockIdx.x; row < rows; row += gridDim.x) {
        for_columns(row, [&](u32) { column.finish(); });
        if (__syncthreads_or(!column.ok())) break;
        const float scale = column.tensor().scale();
        for_columns(row, [&](u32 unit) {
            for (int part = 0; part < Plan::kParts; part++)
                if (unit < (row + 1) * units) column.tensor().normalise(part, unit, scale);
        });
    }
    column.leave_word();
    // Nothing that looks like a result may stand where the result is not to be had.
    for (; row < rows; row += gridDim.x)
        for_columns(row, [&](u32 unit) {
            for (int part = 0; part < Plan::kParts; part++)
                if (unit < (row + 1) * units) column.tensor().poison(part, unit);
        });
    leave(args.control, entry);
}

}  // namespace nvrar
