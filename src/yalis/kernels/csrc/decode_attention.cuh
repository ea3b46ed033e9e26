// SPDX-License-Identifier: Apache-2.0
// Attention of one new token per sequence over a paged cache: decode_attention.py says what is split how.
//
// A block takes a split of one sequence and one key-value head, 256 tokens at a time, 32 for each warp. Keys
// and values go from memory straight into fragments of the tensor core, all of a warp's at once. As in
// few_rows.cuh a thread takes 8 neighbouring dimensions, of queries as of keys, which permutes the terms of a
// sum; of values it takes them for two neighbouring tokens, which permutes the rows of the result.
#pragma once

#include "numbers.cuh"
#include "ptx.cuh"
#include "turn.cuh"

namespace yalis {

constexpr u32 kTokens = 32;  // of a warp
constexpr u32 kAttentionWarps = 8;
constexpr u32 kRound = kTokens * kAttentionWarps;
constexpr u32 kThreads = 32 * kAttentionWarps;

struct AttentionArgs {
    const char* q;
    char *keys, *values;
    const char *new_keys, *new_values, *cos, *sin;  // of the new tokens; with kTurns only
    const int *block_tables, *query_starts, *seq_lens, *split_starts;
    int* tickets;
    float *sums, *norms;
    u16* out;
    u64 q_stride, new_stride, angle_stride;       // bytes from row to row
    u64 token_stride, head_stride, table_stride;  // bytes; of the table in entries
    u32 num_seqs, num_kv_heads, block_size;
    u32 split, most_splits;  // how long a split is, or so many times twice as long that there are few enough
    u32 window;              // how many tokens one sees, itself included
    float scale;             // of scores, times log2(e)
};

// kTurns: q and the new keys are still to be turned to their positions, and the new tokens to be stored.
template <class Number, int kHeadDim, int kGroup, bool kTurns>
struct DecodeAttention {
    static constexpr int kSteps = kHeadDim / 32, kHalves = kHeadDim / 64;
    static_assert(kHeadDim % 64 == 0 && kGroup <= 8);

    struct Shared {
        float totals[kAttentionWarps][kGroup][kHeadDim];
        float peaks[kAttentionWarps][8], norms[kAttentionWarps][8];
        int first_split, num_splits, seq, row;
        u32 len;
        bool is_last;
    };

    const AttentionArgs& args;
    Shared& shared;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 group = lane / 4, member = lane % 4;
    const u32 kv_head = blockIdx.x;

    DecodeAttention(const AttentionArgs& args, Shared& shared) : args(args), shared(shared) {}

    // What is to be known of a sequence; of one that is not there, that it has no splits.
    struct Sequence {
        int start, next, row, len;
    };
    Sequence sequence(u32 i) const {
        if (i >= args.num_seqs) return {};
        return {load_int(args.split_starts + i), load_int(args.split_starts + i + 1),
                load_int(args.query_starts + i), load_int(args.seq_lens + i)};
    }

    void tell(int split, u32 i, const Sequence& it) const {
        if (it.start > split || split >= it.next) return;
        shared.first_split = it.start;
        shared.num_splits = it.next - it.start;
        shared.seq = i;
        shared.row = it.row;
        shared.len = it.len;
    }

    // Which sequence has this split: the thread that finds it tells all. Of the first ones each knows its
    // own.
    void find(int split, const Sequence& mine) const {
        tell(split, threadIdx.x, mine);
#pragma unroll 1
        for (u32 i = threadIdx.x + kThreads; i < args.num_seqs; i += kThreads) tell(split, i, sequence(i));
        __syncthreads();
    }

    u32 split_length(u32 num_seen) const {
        u32 length = args.split;
        while (length * args.most_splits < num_seen) length *= 2;
        return length;
    }

    void turn(Vector (&vector)[kSteps]) const {
        const u64 at = shared.row * args.angle_stride + member * 16;
        yalis::turn<Number>(vector, args.cos + at, args.sin + at);
    }

    // The new token's key is turned and, like its value, stored, by the threads that have them.
    void add_new(Vector (&key)[4][kSteps], const Vector (&value)[2][kHalves][4], u32 token, u32 slot) const {
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            if (token != tile * 8 + group) continue;
            turn(key[tile]);
#pragma unroll
            for (int step = 0; step < kSteps; step++)
                store_global(args.keys + place(slot) + step * 64 + member * 16, key[tile][step]);
        }
#pragma unroll
        for (int pair = 0; pair < 2; pair++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (token != pair * 16 + member * 2 + i % 2 + i / 2 * 8) continue;
#pragma unroll
                for (int half = 0; half < kHalves; half++)
                    store_global(args.values + place(slot) + half * 128 + group * 16, value[pair][half][i]);
            }
    }

    // One warp's tokens of a split, into its part of `shared`.
    void attend(Vector (&q)[kSteps], u32 begin, u32 end) const {
        float all_peak = -infinity(), all_norm = 0;  // of head `group`
        const int* table = args.block_tables + shared.seq * args.table_stride;
        const u32 last = shared.len - 1;
        const u64 new_row = shared.row * args.new_stride + kv_head * kHeadDim * 2;
        const char *new_key = args.new_keys + new_row, *new_value = args.new_values + new_row;
        for (u32 base = begin + warp * kTokens; base < end; base += kRound) {
            const u32 mine = base + lane;
            const u32 slot =
                mine < end ? table[mine / args.block_size] * args.block_size + mine % args.block_size : 0;
            Vector key[4][kSteps] = {};
#pragma unroll
            for (int tile = 0; tile < 4; tile++) {
                const u32 token = tile * 8 + group;
                const char* from = args.keys + place(__shfl_sync(0xffffffff, slot, token));
                if (kTurns && base + token == last) from = new_key;
                from += member * 16;
                if (base + token < end)
#pragma unroll
                    for (int step = 0; step < kSteps; step++) key[tile][step] = load_global(from + step * 64);
            }
            Vector value[2][kHalves][4] = {};  // 16 tokens, of which a thread has four
#pragma unroll
            for (int pair = 0; pair < 2; pair++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 token = pair * 16 + member * 2 + i % 2 + i / 2 * 8;
                    const char* from = args.values + place(__shfl_sync(0xffffffff, slot, token));
                    if (kTurns && base + token == last) from = new_value;
                    from += group * 16;
                    if (base + token < end)
#pragma unroll
                        for (int half = 0; half < kHalves; half++)
                            value[pair][half][i] = load_global(from + half * 128);
                }
            // Now that all is on its way.
            if (kTurns && base == begin + warp * kTokens) turn(q);
            if (kTurns && last - base < kTokens)
                add_new(key, value, last - base, __shfl_sync(0xffffffff, slot, last - base));

            float score[4][4] = {};
            float peak = all_peak;
#pragma unroll
            for (int tile = 0; tile < 4; tile++) {
#pragma unroll
                for (int step = 0; step < kSteps; step++) {
                    const u32(&a)[4] = q[step].part;
                    const u32(&b)[4] = key[tile][step].part;
                    Number::multiply(score[tile], a[0], 0, a[1], 0, b[0], b[1]);
                    Number::multiply(score[tile], a[2], 0, a[3], 0, b[2], b[3]);
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const bool is_there = base + tile * 8 + member * 2 + i < end;
                    score[tile][i] = is_there ? score[tile][i] * args.scale : -infinity();
                    peak = fmaxf(peak, score[tile][i]);
                }
            }
            peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, 1));
            peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, 2));
            const float shrink = exp2f(all_peak - peak);
            all_peak = peak;
            float norm = 0;
            u32 weight[4];
#pragma unroll
            for (int tile = 0; tile < 4; tile++) {
                const float first = exp2f(score[tile][0] - peak), second = exp2f(score[tile][1] - peak);
                norm += first + second;
                weight[tile] = u32(Number::narrow(second)) << 16 | Number::narrow(first);
            }
            norm += __shfl_xor_sync(0xffffffff, norm, 1);
            norm += __shfl_xor_sync(0xffffffff, norm, 2);
            all_norm = all_norm * shrink + norm;

            const float shrinks[2] = {__shfl_sync(0xffffffff, shrink, member * 8),
                                      __shfl_sync(0xffffffff, shrink, member * 8 + 4)};
#pragma unroll
            for (int half = 0; half < kHalves; half++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    // Of dimensions 64 half + 8 group + 2 i (and the next) of heads 2 member (and the next).
                    float total[4] = {};
#pragma unroll
                    for (int pair = 0; pair < 2; pair++) {
                        const Vector(&v)[4] = value[pair][half];
                        Number::multiply(
                            total, low_halves(v[0].part[i], v[1].part[i]),
                            high_halves(v[0].part[i], v[1].part[i]), low_halves(v[2].part[i], v[3].part[i]),
                            high_halves(v[2].part[i], v[3].part[i]), weight[pair * 2], weight[pair * 2 + 1]);
                    }
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const u32 head = member * 2 + j % 2;
                        if (head >= kGroup) continue;
                        float& all = shared.totals[warp][head][half * 64 + group * 8 + i * 2 + j / 2];
                        all = base < begin + kRound ? total[j] : all * shrinks[j % 2] + total[j];
                    }
                }
        }
        if (member == 0) shared.peaks[warp][group] = all_peak, shared.norms[warp][group] = all_norm;
    }

    u64 place(u32 slot) const { return slot * args.token_stride + kv_head * args.head_stride; }

    void store(u32 head, u32 dim, float value) const {
        const u64 row = u64(shared.row) * args.num_kv_heads * kGroup + kv_head * kGroup + head;
        args.out[row * kHeadDim + dim] = Number::narrow(value);
    }

    // Adds what the warps have, in order: to the result, or to what the last split's block will add.
    void merge_warps(int split) const {
        for (u32 i = threadIdx.x; i < kGroup * kHeadDim; i += kThreads) {
            const u32 head = i / kHeadDim, dim = i % kHeadDim;
            float peak = -infinity(), norm = 0, total = 0;
#pragma unroll
            for (u32 w = 0; w < kAttentionWarps; w++) peak = fmaxf(peak, shared.peaks[w][head]);
#pragma unroll
            for (u32 w = 0; w < kAttentionWarps; w++) {
                const float share = exp2f(shared.peaks[w][head] - peak);
                norm += shared.norms[w][head] * share;
                if (shared.norms[w][head] > 0) total += shared.totals[w][head][dim] * share;  // it had tokens
            }
            if (shared.num_splits == 1) {
                store(head, dim, total / norm);
                continue;
            }
            const u64 at = (u64(split) * args.num_kv_heads + kv_head) * kGroup + head;
            args.sums[at * kHeadDim + dim] = total;
            if (dim == 0) args.norms[at * 2] = peak, args.norms[at * 2 + 1] = norm;
        }
    }

    void merge_splits() const {
        for (u32 i = threadIdx.x; i < kGroup * kHeadDim; i += kThreads) {
            const u32 head = i / kHeadDim, dim = i % kHeadDim;
            float peak = -infinity(), norm = 0, total = 0;
#pragma unroll 4
            for (int split = 0; split < shared.num_splits; split++) {
                const u64 at =
                    (u64(shared.first_split + split) * args.num_kv_heads + kv_head) * kGroup + head;
                const float split_peak = __ldcg(args.norms + at * 2),
                            split_norm = __ldcg(args.norms + at * 2 + 1);
                const float split_total = __ldcg(args.sums + at * kHeadDim + dim);
                const float new_peak = fmaxf(peak, split_peak);
                const float shrink = exp2f(peak - new_peak), share = exp2f(split_peak - new_peak);
                norm = norm * shrink + split_norm * share;
                total = total * shrink + split_total * share;
                peak = new_peak;
            }
            store(head, dim, total / norm);
        }
    }

    // Whether all other splits of this sequence and head are done, and their sums to be seen.
    bool is_last() const {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            int* ticket = args.tickets + shared.seq * args.num_kv_heads + kv_head;
            shared.is_last = atomicAdd(ticket, 1) == shared.num_splits - 1;
            if (shared.is_last) *ticket = 0;
            __threadfence();
        }
        __syncthreads();
        return shared.is_last;
    }

    void run() const {
        let_next_start();
        wait_for_previous();
        const Sequence mine = sequence(threadIdx.x);  // read at once with the next, not after it
        const int num_all_splits = load_int(args.split_starts + args.num_seqs);
        for (int split = blockIdx.y; split < num_all_splits; split += gridDim.y) {
            find(split, mine);
            const u32 num_seen = min(shared.len, args.window), length = split_length(num_seen);
            const u32 begin = shared.len - num_seen + (split - shared.first_split) * length;
            const u32 end = min(begin + length, shared.len);
            const char* from =
                args.q + shared.row * args.q_stride + (kv_head * kGroup + group) * kHeadDim * 2;
            Vector q[kSteps] = {};
            if (group < kGroup)
#pragma unroll
                for (int step = 0; step < kSteps; step++)
                    q[step] = load_global(from + step * 64 + member * 16);
            attend(q, begin, end);
            __syncthreads();
            merge_warps(split);
            if (shared.num_splits > 1 && is_last()) merge_splits();
            __syncthreads();  // before another split is found
        }
    }
};

}  // namespace yalis
