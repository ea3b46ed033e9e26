// SPDX-License-Identifier: Apache-2.0
// y = x W^T for a few rows of x, bound by reading W.
//
// A block computes 16 * kTiles outputs in a pass, on tensor cores: W is their 16 rows, x their 8 columns. Its
// warps take turns at chunks of 128 inputs and add their shares at the end of a pass, in order: the sum of an
// output is the same whatever the grid, the tile, and the rows of x beside it. Multiprocessors do not read
// equally fast: where there are many passes, a block has some to begin with and asks for each of the others.
//
// W comes through one queue in shared memory for each thread: it copies just what it will read itself, so
// nothing is to agree on. A fragment of the tensor core is 2 x 2 neighbouring inputs; a thread takes 8
// neighbours, in x as in W, which permutes the terms of a sum of 32.
#pragma once

#include "numbers.cuh"
#include "ptx.cuh"

namespace yalis {

constexpr int kWarps = 8;
constexpr int kStep = 32;       // inputs that a warp multiplies at once: 8 for each of 4 threads
constexpr int kSteps = 2;       // of an item, which a warp fetches at once
constexpr int kChunkItems = 2;  // then the next warp's begin: 256 neighbouring bytes of a row
constexpr u32 kChunk = kStep * kSteps * kChunkItems;
constexpr u32 kAnswers = 16;  // that are kept

struct Args {
    const char* x;
    const char* weight;
    const u16* bias;  // or null
    u16* out;
    u64 x_stride, weight_stride;  // bytes
    u32* counter;                 // how often blocks have asked; zero between launches
    u32 num_rows, num_in, num_out;
    u32 num_given;  // passes that a block has without asking; or 0: all, and each the same number of outputs
    u32 num_ahead;  // passes before one when its answer is kept: at least one more than queues reach
};

// Number: Float16 or BFloat16. kRows: rows of x that there is room for. kTiles: tiles of 16 rows of W.
// kDepth: items in a queue. kGated: half of a tile's rows are gates, half their ups.
template <class Number, int kRows, int kTiles, int kDepth, bool kGated>
struct FewRows {
    static constexpr int kColumns = (kRows + 7) / 8;  // tensor core tiles of x
    static constexpr int kTileOutputs = kGated ? 8 : 16;
    static constexpr int kPassOutputs = kTileOutputs * kTiles;
    static constexpr int kWeightBytes = kTiles * kSteps * 1024;
    static constexpr int kItemBytes = kWeightBytes + kRows * kSteps * 64;
    static constexpr int kQueueBytes = kWarps * kDepth * kItemBytes;
    static constexpr int kSumBytes = kWarps * kRows * kTiles * 16 * 4;
    static constexpr int kSharedBytes = kQueueBytes + kSumBytes + kAnswers * 4;

    // Where a queue's next item begins: a pass and its first output, and inputs.
    struct Cursor {
        u32 pass, output, chunk, part;
    };

    const Args& args;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 group = lane / 4, member = lane % 4;
    const u32 begin, end;  // outputs, which are all this block's if it does not ask
    u32 num_chunks;
    u32 queue;  // this thread's 16 bytes of the first item
    u32 x_queue;
    float* sums;
    u32* answers;
    u64 policy;

    FewRows(const Args& args, char* shared)
        : args(args),
          begin(args.num_given ? blockIdx.x * args.num_given * kPassOutputs
                               : u32(u64(num_outputs(args)) * blockIdx.x / gridDim.x)),
          end(args.num_given ? num_outputs(args)
                             : u32(u64(num_outputs(args)) * (blockIdx.x + 1) / gridDim.x)),
          num_chunks((args.num_in + kChunk - 1) / kChunk),
          sums(reinterpret_cast<float*>(shared + kQueueBytes)),
          answers(reinterpret_cast<u32*>(shared + kQueueBytes + kSumBytes)) {
        const u32 base = u32(__cvta_generic_to_shared(shared)) + warp * kDepth * kItemBytes;
        queue = base + lane * 16;
        x_queue = base + kWeightBytes + group * 64 + member * 16;
        policy = evict_first();
    }

    static u32 num_outputs(const Args& args) { return kGated ? args.num_out / 2 : args.num_out; }

    u32 output_of(u32 pass) const {
        if (args.num_given && pass >= args.num_given) return answers[pass % kAnswers];
        return begin + pass * kPassOutputs;
    }
    Cursor first() const { return {0, begin, warp, 0}; }
    bool is_end(const Cursor& at) const { return at.output >= end || warp >= num_chunks; }

    void advance(Cursor& at) const {
        if (++at.part < kChunkItems) return;
        at.part = 0;
        at.chunk += kWarps;
        if (at.chunk < num_chunks) return;
        if (is_end(at)) return;
        at.chunk = warp;
        at.output = output_of(++at.pass);
    }

    u32 first_input(const Cursor& at) const {
        return at.chunk * kChunk + at.part * kSteps * kStep + member * 8;
    }

    void fetch_weights(const Cursor& at, u32 slot) const {
        const u32 input = first_input(at);
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 output = at.output + tile * kTileOutputs + group;
                if (!kGated) output += half * 8;
                const u32 row = (output < end ? output : 0) + (kGated ? half * num_outputs(args) : 0);
                const char* from = args.weight + row * args.weight_stride;
#pragma unroll
                for (int step = 0; step < kSteps; step++) {
                    const u32 k = input + step * kStep;
                    const bool is_there = output < end && k < args.num_in;
                    copy_16_bytes(queue + slot * kItemBytes + ((tile * 2 + half) * kSteps + step) * 512,
                                  from + (is_there ? k * 2 : 0), is_there, policy);
                }
            }
        }
    }

    void fetch_x(const Cursor& at, u32 slot) const {
        const u32 input = first_input(at);
#pragma unroll
        for (int column = 0; column < kColumns; column++) {
            const u32 row = column * 8 + group;
            if (row >= kRows) continue;
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
                const u32 k = input + step * kStep;
                const bool is_there = row < args.num_rows && k < args.num_in;
                copy_16_bytes(x_queue + slot * kItemBytes + (step * kRows + column * 8) * 64,
                              args.x + (is_there ? row * args.x_stride + k * 2 : 0), is_there);
            }
        }
    }

    void multiply(float (&total)[kTiles][kColumns][4], u32 slot) const {
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            Vector columns[kColumns] = {};
#pragma unroll
            for (int column = 0; column < kColumns; column++)
                if (column * 8 + group < kRows)
                    columns[column] =
                        load_16_bytes(x_queue + slot * kItemBytes + (step * kRows + column * 8) * 64);
#pragma unroll
            for (int tile = 0; tile < kTiles; tile++) {
                const u32 from = queue + slot * kItemBytes + (tile * 2 * kSteps + step) * 512;
                const Vector low = load_16_bytes(from), high = load_16_bytes(from + kSteps * 512);
#pragma unroll
                for (int column = 0; column < kColumns; column++) {
                    const u32(&b)[4] = columns[column].part;
                    Number::multiply(total[tile][column], low.part[0], high.part[0], low.part[1],
                                     high.part[1], b[0], b[1]);
                    Number::multiply(total[tile][column], low.part[2], high.part[2], low.part[3],
                                     high.part[3], b[2], b[3]);
                }
            }
        }
    }

    float* sum_of(u32 of_warp, u32 row, u32 output) const {
        return sums + ((of_warp * kRows + row) * kTiles * 16 + output);
    }

    void keep(const float (&total)[kTiles][kColumns][4]) const {
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
            for (int column = 0; column < kColumns; column++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 row = column * 8 + member * 2 + i % 2;
                    if (row < kRows)
                        *sum_of(warp, row, tile * 16 + i / 2 * 8 + group) = total[tile][column][i];
                }
    }

    float sum(u32 row, u32 output) const {
        float total = *sum_of(0, row, output);
#pragma unroll
        for (int of_warp = 1; of_warp < kWarps; of_warp++) total += *sum_of(of_warp, row, output);
        return total;
    }

    void store(u32 first_output) const {
        const u32 num_pass = min(u32(kPassOutputs), end - first_output);
        for (u32 i = threadIdx.x; i < kPassOutputs * args.num_rows; i += kWarps * 32) {
            const u32 row = i / kPassOutputs, output = i % kPassOutputs;
            if (output >= num_pass) continue;
            const u32 at = output / kTileOutputs * 16 + output % kTileOutputs;
            float value = sum(row, at);
            if (args.bias) value += Number::widen(args.bias[first_output + output]);
            u16 result = Number::narrow(value);
            if (kGated) {
                const float gate = Number::widen(result);
                const float silu = Number::widen(Number::narrow(gate / (1.0f + expf(-gate))));
                result = Number::narrow(silu * Number::widen(Number::narrow(sum(row, at + 8))));
            }
            args.out[u64(row) * num_outputs(args) + first_output + output] = result;
        }
    }

    // The first output of a pass that nobody has yet, or one beyond the end. Every block asks until it is
    // told that, once: with that the count is zero again.
    u32 ask() const {
        const u32 num_given = args.num_given * gridDim.x;
        const u32 num_left = (num_outputs(args) - 1) / kPassOutputs + 1 - num_given;
        return (num_given + atomicInc(args.counter, num_left + gridDim.x - 1)) * kPassOutputs;
    }

    void run() const {
        let_next_start();
        Cursor ahead = first();
#pragma unroll
        for (int item = 0; item < kDepth; item++) {
            if (!is_end(ahead)) fetch_weights(ahead, item);
            end_item();
            advance(ahead);
        }
        wait_for_previous();
        Cursor again = first();
#pragma unroll
        for (int item = 0; item < kDepth; item++) {
            if (!is_end(again)) fetch_x(again, item);
            end_item();
            advance(again);
        }

        u32 slot = 0, answer = 0;
        bool asks = args.num_given && threadIdx.x == 0;
        if (asks && args.num_ahead == args.num_given) answer = ask();
        for (u32 pass = 0;; pass++) {
            const u32 output = output_of(pass);
            if (output >= end) break;
            float total[kTiles][kColumns][4] = {};
            for (u32 chunk = warp; chunk < num_chunks; chunk += kWarps) {
                for (int part = 0; part < kChunkItems; part++) {
                    wait_item<kDepth - 1>();
                    multiply(total, slot);
                    if (!is_end(ahead)) {
                        fetch_weights(ahead, slot);
                        fetch_x(ahead, slot);
                    }
                    end_item();
                    advance(ahead);
                    slot = slot + 1 == kDepth ? 0 : slot + 1;
                }
            }
            const u32 asked = pass + args.num_ahead;
            if (asks && asked >= args.num_given) {  // the answer had a pass's time to come
                answers[asked % kAnswers] = answer;
                asks = answer < end;
            }
            __syncthreads();  // the sums of the pass before are read
            if (asks && asked + 1 >= args.num_given) answer = ask();
            keep(total);
            __syncthreads();
            store(output);
        }
    }
};

}  // namespace yalis
