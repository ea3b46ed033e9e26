// SPDX-License-Identifier: Apache-2.0
// The kernel that goes on after the sum: adds the residual and normalises each row (RMSNorm). A row is taken by
// one block, or by the blocks of one cluster, so the norm needs nobody else.
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

// The blocks that share a row.
struct Team {
#if __CUDA_ARCH__ >= 900
    u32 rank, size;

    static Team mine() {
        Team team;
        asm("mov.u32 %0, %cluster_ctarank;" : "=r"(team.rank));
        asm("mov.u32 %0, %cluster_nctaid.x;" : "=r"(team.size));
        return team;
    }
    // Into the shared memory of every member, at the place that `address` is here.
    template <class T>
    void store(T* address, T value) const {
        if (size == 1) {
            *address = value;
            return;
        }
        const u32 here = u32(__cvta_generic_to_shared(address));
        u32 bits;
        memcpy(&bits, &value, 4);
        for (u32 member = 0; member < size; member++) {
            u32 there;
            asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(member));
            asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(bits) : "memory");
        }
    }
    void meet() const {
        if (size == 1) {
            __syncthreads();
            return;
        }
        asm volatile("barrier.cluster.arrive.release;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    }
#else
    static constexpr u32 rank = 0, size = 1;

    static Team mine() { return {}; }
    template <class T>
    void store(T* address, T value) const {
        *address = value;
    }
    void meet() const { __syncthreads(); }
#endif
};

// The tensor as rows, each cut into the parts of the plan; a row ends within a unit where it must.
template <class Plan, class Packet, class Type>
class Rows {
    using Words = Message<Packet, Type, true>;
    static constexpr int kPerWord = Type::kPerWord;
    static constexpr u32 kChunkWords = LL128::kDataBytes / 8;

  public:
    using Payload = typename Packet::Payload;
    // Whether a thread holds a column of h and of the weight in registers.
    static constexpr bool kHolds = Plan::kParts <= 4 && Plan::kParts * Packet::kWords <= 8;

    explicit Rows(const Args<Plan>& args) : args_(args) {}

    void go_to_row(u32 row) { row_ = row; }

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

    // Adds the residual, and leaves the squares for `find_scale`.
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
            const bool counts = Words::holds(half) && at < row_end();
            if constexpr (Packet::kThreads == 1) {
                if (counts) word_sums()[(at - row_start()) / 8] = of_word;
            }
            squares = __fadd_rn(squares, counts ? of_word : 0);
        }
        if constexpr (Packet::kThreads == 32) {  // a unit is a chunk, but that parts may end within one
            squares = add_up_lanes(squares);
            const u32 chunk = part * args_.norm.row_units + unit - row_ * args_.norm.row_units;
            if (threadIdx.x % 32 == 0) team_.store(&chunk_sums()[chunk], squares);
        }
        if constexpr (kHolds) h_.set(part, h);
        Words::store(args_.norm.residual_out, start(part, unit), row_end(), h);
    }

    // 1 / sqrt(mean of squares + eps) of the row, once all threads of all its blocks have stored it; false if
    // any of them is not ok.
    bool find_scale(bool ok, float& scale) {
        const u32 lane = threadIdx.x % 32, words = args_.norm.row_bytes / 8;
        const u32 chunks = (words + kChunkWords - 1) / kChunkWords;
        if (!ok) team_.store(&broken(), 1u);
        team_.meet();
        const bool failed = broken() != 0;
        if constexpr (Packet::kThreads == 1) {
            for (u32 chunk = threadIdx.x / 32; chunk < chunks; chunk += blockDim.x / 32) {
                float total = 0;
                for (int w = 0; w < LL128::kWords; w++) {
                    const u32 at = chunk * kChunkWords + LL128::data_offset(lane, w / 2) / 8 + w % 2;
                    if (LL128::holds_half(lane, w / 2) && at < words) total = __fadd_rn(total, word_sums()[at]);
                }
                total = add_up_lanes(total);
                if (lane == 0) chunk_sums()[chunk] = total;
            }
            __syncthreads();
        }
        float total = 0;
        for (u32 chunk = lane; chunk < chunks; chunk += 32) total = __fadd_rn(total, chunk_sums()[chunk]);
        total = add_up_lanes(total);
        odd_ = !odd_;
        const float mean = __fmul_rn(total, args_.norm.share);
        scale = __frcp_rn(__fsqrt_rn(__fadd_rn(mean, args_.norm.eps)));
        return !failed;
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

    const Team& team() const { return team_; }
    static u32& broken() {
        __shared__ u32 flag;
        return flag;
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
    Payload load_weight(int part, u32 unit, bool live) const {
        const u64 in_row = start(part, unit) - row_start();
        return Words::load(args_.norm.weight, in_row, live ? args_.norm.row_bytes : 0);
    }

    // Two sets of chunks, used by rows in turn: a block may be one row ahead of another of its team. Behind
    // them, for LL, the words of a row.
    u32 most_chunks() const { return args_.norm.row_units * Plan::kParts * Packet::kDataBytes / LL128::kDataBytes + 1; }
    float* chunk_sums() const {
        extern __shared__ float sums[];
        return sums + (odd_ ? most_chunks() : 0);
    }
    float* word_sums() const {
        extern __shared__ float sums[];
        return sums + 2 * most_chunks();
    }

    const Args<Plan>& args_;
    const Team team_ = Team::mine();
    u32 row_ = 0;
    bool odd_ = false;
    Registers<Payload, kHolds ? Plan::kParts : 1> h_, weight_;
};

template <class Packet, class Type, class Plan>
inline void all_reduce_add_rms_norm(const Args<Plan>& args) {
    using Tensor = Rows<Plan, Packet, Type>;
    using Columns = Column<Plan, Packet, Type, Sum, Tensor>;
    wait_for_previous_kernel();
    Columns column(args);
    Tensor& tensor = column.tensor();
    const Team team = tensor.team();
    const u32 lanes = blockDim.x / Packet::kThreads, place = threadIdx.x / Packet::kThreads;
    const u32 first = team.rank * lanes + place, step = team.size * lanes;
    const u32 units = args.norm.row_units, rows = args.num_units / units;
    const u32 first_row = blockIdx.x / team.size, row_step = gridDim.x / team.size;
    // Where blocks put, their threads keep step: the loops' bound is the block's.
    const u32 ahead = Plan::uses(Transport::kPut) ? place : 0;

    // Of a row, the units of this thread.
    const auto for_columns = [&](u32 row, u32 from, auto&& action) {
        tensor.go_to_row(row);
#pragma unroll 1
        for (u32 unit = from; unit - ahead < units; unit += step) {
            column.go_to(row * units + unit, (row + 1) * units);
            action(row * units + unit);
        }
    };

    // The first column is loaded while the epoch is on its way.
    if (threadIdx.x == 0) Tensor::broken() = 0;
    tensor.go_to_row(first_row);
    column.go_to(first_row * units + first, (first_row + 1) * units);
    typename Columns::Ahead input;
    if constexpr (Columns::kLoadsAhead) column.load_ahead(input);
    tensor.fetch(first_row * units + first, first < units);
    const Entry entry = enter(args.control);
    column.enter(entry);
    let_next_kernel_start(args);
    if constexpr (Columns::kLoadsAhead) {
        if (first - ahead < units) column.send_input(input);
    }
    if (team.size > 1) team.meet();  // all have cleared their flag, and are there to be written to
    u32 row = first_row;
#pragma unroll 1
    for (; row < rows; row += row_step)
        for_columns(row, Columns::kLoadsAhead && row == first_row ? first + step : first,
                    [&](u32) { column.send_input(); });
    const bool held = units <= step;  // one column a thread
#pragma unroll 1
    for (row = first_row; row < rows; row += row_step) {
        for_columns(row, first, [&](u32 unit) {
            if (row != first_row || unit != row * units + first) tensor.fetch(unit, unit < (row + 1) * units);
            column.finish();
        });
        float scale;
        if (!tensor.find_scale(column.ok(), scale)) break;
        for_columns(row, first, [&](u32 unit) {
#pragma unroll
            for (int part = 0; part < Plan::kParts; part++)
                if (unit < (row + 1) * units) tensor.normalise(part, unit, scale, held);
        });
    }
    column.leave_word();
    // Nothing that looks like a result may stand where the result is not to be had.
#pragma unroll 1
    for (; row < rows; row += row_step)
        for_columns(row, first, [&](u32 unit) {
            for (int part = 0; part < Plan::kParts; part++)
                if (unit < (row + 1) * units) tensor.poison(part, unit);
        });
    leave(args.control, entry);
}

}  // namespace nvrar
