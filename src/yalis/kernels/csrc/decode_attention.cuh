// SPDX-License-Identifier: Apache-2.0
// Attention of one new token per sequence over a paged cache: decode_attention.py says what is split how.
//
// A block takes a split of one sequence and one key-value head, 256 tokens at a time, 32 for each warp. Keys
// and values go from memory straight into fragments of the tensor core, all of a warp's at once. As in
// few_rows.cuh a thread takes 8 neighbouring dimensions, of queries as of keys, which permutes the terms of a
// sum; of values it takes them for two neighbouring tokens, which permutes the rows of the result.
//
// With kTurns the tokens in the cache are of earlier steps: the first of them are fetched while the kernel
// before still runs, which brings the new token. Between `plan_decode` and this kernel there is an ordinary
// launch, so that by now the plan is to be seen too.
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

    // Of the new token's place.
    Angles<kSteps> angles() const {
        Angles<kSteps> of;
        const u64 at = shared.row * args.angle_stride + member * 16;
        of.load(args.cos + at, args.sin + at);
        return of;
    }

    // What a warp has of 32 tokens: of keys all of `tile * 8 + group`, of values four in each 16.
    struct Tokens {
        Vector key[4][kSteps];
        Vector value[2][kHalves][4];
        u32 slot;  // of token `lane`
    };
    static u32 value_token(int pair, u32 member, int i) { return pair * 16 + member * 2 + i % 2 + i / 2 * 8; }

    // From the cache, where the new token is not yet with kTurns.
    void load(Tokens& tokens, u32 base, u32 end) const {
        if (kTurns) end = min(end, shared.len - 1);
        const int* table = args.block_tables + shared.seq * args.table_stride;
        const u32 mine = base + lane;
        // Of the new token too, to store it.
        const bool has_place = mine < shared.len;
        tokens.slot =
            has_place ? load_int(table + mine / args.block_size) * args.block_size + mine % args.block_size
                      : 0;
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            const u32 token = tile * 8 + group;
            const char* from = args.keys + place(__shfl_sync(0xffffffff, tokens.slot, token)) + member * 16;
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
                tokens.key[tile][step] = {};
                if (base + token < end) tokens.key[tile][step] = load_early(from + step * 64);
            }
        }
#pragma unroll
        for (int pair = 0; pair < 2; pair++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 token = value_token(pair, member, i);
                const char* from =
                    args.values + place(__shfl_sync(0xffffffff, tokens.slot, token)) + group * 16;
#pragma unroll
                for (int half = 0; half < kHalves; half++) {
                    tokens.value[pair][half][i] = {};
                    if (base + token < end) tokens.value[pair][half][i] = load_early(from + half * 128);
                }
            }
    }

    // The new token, if it is among a warp's: in two moves, so that nothing waits between the loads.
    u32 new_token(u32 base) const { return shared.len - 1 - base; }
    void load_new(Tokens& tokens, u32 base) const {
        const u64 row = shared.row * args.new_stride + kv_head * kHeadDim * 2;
#pragma unroll
        for (int tile = 0; tile < 4; tile++)
            if (new_token(base) == tile * 8 + group)
#pragma unroll
                for (int step = 0; step < kSteps; step++)
                    tokens.key[tile][step] = load_global(args.new_keys + row + step * 64 + member * 16);
#pragma unroll
        for (int pair = 0; pair < 2; pair++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (new_token(base) == value_token(pair, member, i))
#pragma unroll
                    for (int half = 0; half < kHalves; half++)
                        tokens.value[pair][half][i] =
                            load_global(args.new_values + row + half * 128 + group * 16);
    }
    void store_new(Tokens& tokens, u32 base, const Angles<kSteps>& angles) const {
        if (new_token(base) >= kTokens) return;
        const u64 at = place(__shfl_sync(0xffffffff, tokens.slot, new_token(base)));
#pragma unroll
        for (int tile = 0; tile < 4; tile++)
            if (new_token(base) == tile * 8 + group) {
                turn<Number>(tokens.key[tile], angles);
#pragma unroll
                for (int step = 0; step < kSteps; step++)
                    store_global(args.keys + at + step * 64 + member * 16, tokens.key[tile][step]);
            }
#pragma unroll
        for (int pair = 0; pair < 2; pair++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (new_token(base) == value_token(pair, member, i))
#pragma unroll
                    for (int half = 0; half < kHalves; half++)
                        store_global(args.values + at + half * 128 + group * 16, tokens.value[pair][half][i]);
    }

    // One warp's tokens of a split, of which it has the first, into its part of `shared`.
    void attend(const Vector (&q)[kSteps], Tokens& tokens, u32 begin, u32 end) const {
        float all_peak = -infinity(), all_norm = 0;  // of head `group`
        for (u32 base = begin + warp * kTokens; base < end; base += kRound) {
            if (base >= begin + kRound) {
                load(tokens, base, end);
                if (kTurns && new_token(base) < kTokens) {
                    load_new(tokens, base);
                    store_new(tokens, base, angles());
                }
            }
            const auto& key = tokens.key;
            const auto& value = tokens.value;

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
        if (!kTurns) wait_for_previous();
        bool is_first = kTurns;
        const Sequence mine = sequence(threadIdx.x);  // read at once with the next, not after it
        const int num_all_splits = load_int(args.split_starts + args.num_seqs);
        for (int split = blockIdx.y; split < num_all_splits; split += gridDim.y) {
            find(split, mine);
            const u32 num_seen = min(shared.len, args.window), length = split_length(num_seen);
            const u32 begin = shared.len - num_seen + (split - shared.first_split) * length;
            const u32 end = min(begin + length, shared.len);
            Tokens tokens;
            load(tokens, begin + warp * kTokens, end);
            if (is_first) wait_for_previous();
            is_first = false;
            const char* from =
                args.q + shared.row * args.q_stride + (kv_head * kGroup + group) * kHeadDim * 2;
            Vector q[kSteps] = {};
            if (group < kGroup)
#pragma unroll
                for (int step = 0; step < kSteps; step++)
                    q[step] = load_global(from + step * 64 + member * 16);
            if (kTurns) {
                const u32 base = begin + warp * kTokens;
                load_new(tokens, base);
                const Angles<kSteps> here = angles();
                turn<Number>(q, here);
                store_new(tokens, base, here);
            }
            attend(q, tokens, begin, end);
            __syncthreads();
            merge_warps(split);
            if (shared.num_splits > 1 && is_last()) merge_splits();
            __syncthreads();  // before another split is found
        }
        if (is_first) wait_for_previous();
    }
};

}  // namespace yalis
