// SPDX-License-Identifier: Apache-2.0
// The kernel that goes on after the sum: adds the residual and normalises each row (RMSNorm). A row is taken
// by one block, or by the blocks of one cluster, so the norm needs nobody else.
//
//     h = round(sum + residual);  out = round(round(h * (1 / sqrt(mean(h * h) + eps))) * weight)
//
// in fp32 but for the roundings to the type. The squares are added in one order whatever the packets and the
// launch: in chunks of 960 bytes, each by 32 lanes as LL128 deals it out to them, a lane's words and their
// elements in turn, then halves of the lanes; the chunks by 32 lanes in turn, then halves.
// nvrar/rms_norm.py is the same in torch.
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
    static constexpr u32 kFailed = 1u << 31;

  public:
    // With LL128 a unit is a chunk, and a warp has it. With LL, whose units are words, a block has all of a
    // chunk's, and leaves their squares in its memory for a warp to add up.
    static constexpr u32 kChunkUnits = LL128::kDataBytes / Packet::kDataBytes;
    using Payload = typename Packet::Payload;
    // Whether a thread holds a column of h and of the weight in registers.
    static constexpr bool kHolds = Plan::kParts <= 4 && Plan::kParts * Packet::kWords <= 8;

    explicit Rows(const Args<Plan>& args) : args_(args) {}

    // Before the first row, and before anybody else's memory is read or written.
    static void begin(const Args<Plan>& args) {
        for (u32 i = threadIdx.x; i < 2 * num_marks(args); i += blockDim.x) all_marks()[i] = 0;
        Team::meet();
    }

    void go_to_row(u32 row) { row_ = row; }
    void next_turn() { turn_++; }

    Payload load(int part, u32 unit, bool live) const {
        return Words::load(args_.in, start(part, unit), live ? row_end() : 0);
    }

    void fetch(u32 unit, bool live) {
        if constexpr (kHolds) {
#pragma unroll
            for (int part = 0; part < Plan::kParts; part++) {
                h_.value[part] = load_residual(part, unit, live);
                weight_.value[part] = load_weight(part, unit, live);
            }
        }
    }

    // Adds the residual, and tells the sum of a chunk's squares, or leaves them for `tell_sums`.
    void store(int part, u32 unit, const Payload& sum) {
        Payload h = kHolds ? h_.get(part) : load_residual(part, unit, true);
        const u64 from = start(part, unit);
        float squares = 0;
#pragma unroll
        for (int w = 0; w < Packet::kWords; w++) {
            const int half = w / Words::kWords;
            const u64 at = Words::offset(from, half) + 8 * (w % Words::kWords);
            h.word[w] = Type::add(sum.word[w], h.word[w]);
            float a[kPerWord];
            Type::widen(h.word[w], a);
            float of_word = __fmul_rn(a[0], a[0]);
#pragma unroll
            for (int e = 1; e < kPerWord; e++) of_word = __fadd_rn(of_word, __fmul_rn(a[e], a[e]));
            squares = __fadd_rn(squares, Words::holds(half) && at < row_end() ? of_word : 0);
        }
        if constexpr (kChunkUnits == 1)
            tell(place(part, unit), add_up_lanes(squares), false);
        else
            word_sums()[place(part, unit)] = squares;
        if constexpr (kHolds) h_.set(part, h);
        Words::store(args_.norm.residual_out, from, row_end(), h);
    }

    // 1 / sqrt(mean of squares + eps) of the row, once the sums of all its chunks are told; false if one is
    // not to be had.
    bool find_scale(float& scale) {
        bool failed = false;
        float total = 0;
        for (u32 chunk = threadIdx.x % 32; chunk < num_chunks(); chunk += 32) {
            u32 sum, tag;
            // It comes: whoever holds the chunk waits for packets within the budget, and then says so. A warp
            // that tells none may come late, and find the mark of a later turn, which nobody comes to after a
            // failure. (With LL it may hold units: then the barrier of `tell_sums` keeps others from a later
            // turn.)
            do {
                const u64 mark = Team::load(marks() + chunk);
                sum = u32(mark);
                tag = u32(mark >> 32);
            } while ((tag & ~kFailed) < turn_);
            failed |= tag == (turn_ | kFailed);
            total = __fadd_rn(total, __uint_as_float(sum));
        }
        total = add_up_lanes(total);
        const float mean = __fmul_rn(total, args_.norm.share);
        scale = __frcp_rn(__fsqrt_rn(__fadd_rn(mean, args_.norm.eps)));
        return !__any_sync(~0u, failed);
    }

    // For a unit whose sum did not come, in the place of `store`. If of its parts only such did not come as
    // lie behind the row's end, the row is whole, and others may be through with it: what was told stays.
    // (With LL nothing was told before the block has met, and all of its chunks fail.)
    void tell_failure(int part, u32 unit) {
        if constexpr (kChunkUnits == 1) tell(place(part, unit), 0, true);
    }

    // By all threads of the block, once they have stored their units of the row: `first` to `first + lanes`
    // of each part, and so on at every `step`. `ok`: whether this thread has stored its own.
    void tell_sums(bool ok, u32 first, u32 lanes, u32 step) {
        if constexpr (kChunkUnits > 1) {
            const bool failed = __syncthreads_or(!ok);
            const u32 lane = threadIdx.x % 32, units = args_.norm.row_units;
            u32 turn = threadIdx.x / 32;  // of the warps
            for (; first < units; first += step)
                for (u32 from = first; from < first + lanes && from < units; from += kChunkUnits)
                    for (int part = 0; part < Plan::kParts; part++) {
                        if (turn-- != 0) continue;
                        turn = blockDim.x / 32 - 1;
                        const float* words = word_sums() + part * units + from;
                        float sum = 0;
#pragma unroll
                        for (int w = 0; w < LL128::kWords; w++)
                            if (LL128::holds_half(lane, w / 2))
                                sum = __fadd_rn(sum, words[LL128::data_offset(lane, w / 2) / 8 + w % 2]);
                        tell((part * units + from) / kChunkUnits, add_up_lanes(sum), failed);
                    }
        }
    }

    // Of a unit that this thread has stored; `held` if it was the last, and so is in registers.
    void normalise(int part, u32 unit, float scale, bool held) const {
        Payload h, weight;
        if (kHolds && held) {
            h = h_.get(part);
            weight = weight_.get(part);
        } else {
            h = Words::load(args_.norm.residual_out, start(part, unit), row_end());
            weight = load_weight(part, unit, true);
        }
#pragma unroll
        for (int w = 0; w < Packet::kWords; w++) {
            float a[kPerWord];
            Type::widen(h.word[w], a);
#pragma unroll
            for (int e = 0; e < kPerWord; e++) a[e] = __fmul_rn(a[e], scale);
            h.word[w] = Type::multiply(Type::narrow(a), weight.word[w]);
        }
        Words::store(args_.out, start(part, unit), row_end(), h);
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
    u64 start(int part, u32 unit) const { return row_start() + u64(place(part, unit)) * Packet::kDataBytes; }

    Payload load_residual(int part, u32 unit, bool live) const {
        return Words::load(args_.norm.residual, start(part, unit), live ? row_end() : 0);
    }
    Payload load_weight(int part, u32 unit, bool live) const {
        const u64 in_row = start(part, unit) - row_start();
        return Words::load(args_.norm.weight, in_row, live ? args_.norm.row_bytes : 0);
    }

    // Of the row's units, part after part.
    u32 place(int part, u32 unit) const {
        const u32 units = args_.norm.row_units;
        return part * units + unit - row_ * units;
    }

    // Stores a mark at every member of the team: the sum beside the number of the row's turn. No barrier.
    void tell(u32 chunk, float squares, bool failed) {
        const u32 lane = threadIdx.x % 32;
        // Of one behind the row's end nobody waits for the mark, so a member may have left before it came.
        if (Plan::kParts > 1 && chunk >= num_chunks()) return;
        if (failed) {  // each mark is told once a turn, so that all who read it go the same way
            const u32 tag = u32(Team::load(marks() + chunk) >> 32);
            if (__shfl_sync(~0u, tag, Team::rank()) == turn_) return;  // this lane stored it here
        }
        const u64 mark = u64(turn_ | (failed ? kFailed : 0)) << 32 | __float_as_uint(squares);
        if (lane < Team::size()) Team::store(lane, marks() + chunk, mark);
    }

    u32 num_chunks() const { return (args_.norm.row_bytes + LL128::kDataBytes - 1) / LL128::kDataBytes; }

    // Two sets, used in turn: a warp may be one row ahead of another that tells marks, but no more, as it
    // takes all of them to go on.
    static u32 num_marks(const Args<Plan>& args) { return args.norm.row_units / kChunkUnits * Plan::kParts; }
    static u64* all_marks() { return reinterpret_cast<u64*>(dynamic_shared()); }
    u64* marks() const { return all_marks() + (turn_ % 2 ? num_marks(args_) : 0); }

    float* word_sums() const { return reinterpret_cast<float*>(all_marks() + 2 * num_marks(args_)); }

    const Args<Plan>& args_;
    u32 row_ = 0;
    u32 turn_ = 1;  // 0 is what marks begin with
    Registers<Payload, kHolds ? Plan::kParts : 1> h_, weight_;
};

// A launch has a team for each row, or fewer (layout.py): none may be without.
template <class Packet, class Type, class Plan>
inline void all_reduce_add_rms_norm(const Args<Plan>& args) {
    using Tensor = Rows<Plan, Packet, Type>;
    using Columns = Column<Plan, Packet, Type, Sum, Tensor>;
    Tensor::begin(args);
    wait_for_previous_kernel();
    Columns column(args);
    Tensor& tensor = column.tensor();
    // Units are dealt out in whole chunks, and what threads that leaves over only keep step.
    const u32 lanes = blockDim.x / Packet::kThreads / Tensor::kChunkUnits * Tensor::kChunkUnits;
    const u32 place = threadIdx.x / Packet::kThreads, step = Team::size() * lanes;
    const u32 of_block = Team::rank() * lanes, first = of_block + place;
    const u32 units = args.norm.row_units, rows = args.norm.num_rows;
    const u32 first_row = Team::id(), row_step = Team::number();
    // Where blocks put, their threads keep step: the loops' bound is the block's.
    const u32 ahead = Plan::uses(Transport::kPut) ? place : 0;

    const auto go_to = [&](u32 row, u32 unit) {
        const u32 end = min(units, unit - place + lanes);
        column.go_to(row * units + unit, row * units + end);
    };
    // Of a row, the units of this thread.
    const auto for_columns = [&](u32 row, u32 from, auto&& action) {
        tensor.go_to_row(row);
#pragma unroll 1
        for (u32 unit = from; unit - ahead < units; unit += step) {
            go_to(row, unit);
            action(row * units + unit);
        }
    };

    // The first column is loaded while the epoch is on its way.
    tensor.go_to_row(first_row);
    go_to(first_row, first);
    typename Columns::Ahead input;
    if constexpr (Columns::kLoadsAhead) column.load_ahead(input);
    tensor.fetch(first_row * units + first, column.live());
    const Entry entry = enter(args.control);
    column.enter(entry);
    let_next_kernel_start(args);
    if constexpr (Columns::kLoadsAhead) {
        if (first - ahead < units) column.send_input(input);
    }
#pragma unroll 1
    for (u32 row = first_row; row < rows; row += row_step)
        for_columns(row, Columns::kLoadsAhead && row == first_row ? first + step : first,
                    [&](u32) { column.send_input(); });
    const bool held = units <= step;  // one column a thread
    u32 row = first_row;
    // Warps without a unit go along: a block may not leave before others' marks are in.
#pragma unroll 1
    for (; row < rows; row += row_step) {
        for_columns(row, first, [&](u32 unit) {
            if (row != first_row || unit != row * units + first) tensor.fetch(unit, column.live());
            column.finish();
            if (!column.ok()) {
                for (int part = 0; part < Plan::kParts; part++)
                    if (column.live()) tensor.tell_failure(part, unit);
            }
        });
        tensor.tell_sums(column.ok(), of_block, lanes, step);
        float scale;
        if (!tensor.find_scale(scale)) break;
        for_columns(row, first, [&](u32 unit) {
#pragma unroll
            for (int part = 0; part < Plan::kParts; part++)
                if (column.live()) tensor.normalise(part, unit, scale, held);
        });
        tensor.next_turn();
    }
    column.leave_word();
    // Nothing that looks like a result may stand where the result is not to be had.
#pragma unroll 1
    for (; row < rows; row += row_step)
        for_columns(row, first, [&](u32 unit) {
            for (int part = 0; part < Plan::kParts; part++)
                if (column.live()) tensor.poison(part, unit);
        });
    leave(args, entry);
}

}  // namespace nvrar
