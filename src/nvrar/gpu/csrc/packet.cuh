// SPDX-License-Identifier: Apache-2.0
// Packets: data that carries its own flag, so that one load tells whether it has arrived and what it is.
//
// A packet type says how a unit of kDataBytes of the message travels as kSlotBytes of an inbox:
//
//   LL     one thread      | data 4 B | flag 4 B | data 4 B | flag 4 B |           8 of 16 bytes are data
//   LL128  one warp        8 lines of   | data 120 B ........ | flag 8 B |       960 of 1024 bytes are data
//
// LL needs memory that keeps aligned 8-byte stores whole: everything does. LL128 needs a 128-byte line
// stored by 8 neighbouring threads in one instruction to arrive whole: NVLink and device memory do.
//
// The flag is the epoch; beside it travels a 16-bit signature of the call (size, type, operation, plan), so
// that two ranks that disagree about the call find out instead of adding what does not belong together.
#pragma once

#include "ptx.cuh"

namespace nvrar {

struct Flag {
    u32 epoch;
    u32 signature;  // 16 bits
};

enum class Arrival { kMissing, kFresh, kForeign };  // foreign: of this epoch, but of another call

template <int kWords_>
struct Value {
    u64 word[kWords_];
};

struct LL {
    static constexpr int kThreads = 1;
    static constexpr int kWords = 1;
    static constexpr int kDataBytes = 8;
    static constexpr int kSlotBytes = 16;
    using Payload = Value<kWords>;

    // Where a lane's words are from the start of the unit's data, by half; and its packets in the slot.
    static bool holds_half(int, int) { return true; }
    static int data_offset(int, int) { return 0; }
    static int slot_offset(int) { return 0; }

    static void store(char* slot, const Payload& value, Flag flag) {
        store_16(slot, u32(value.word[0]), flag.epoch, u32(value.word[0] >> 32),
                 flag.epoch ^ flag.signature << 16);
    }

    static Arrival load(const char* slot, Payload& value, Flag flag) {
        // One instruction for data and flag: two loads could pair a new flag with an old payload.
        u32 low, first, high, second;
        load_16(slot, low, first, high, second);
        value.word[0] = u64(high) << 32 | low;
        if (first != flag.epoch) return Arrival::kMissing;
        if (second == (flag.epoch ^ flag.signature << 16)) return Arrival::kFresh;
        // The halves may arrive one after the other; then the second still holds another epoch.
        return ((second ^ flag.epoch) & 0xffff) == 0 ? Arrival::kForeign : Arrival::kMissing;
    }

    // What threads that share a unit must decide together.
    static bool all(bool mine) { return mine; }
    static bool any(bool mine) { return mine; }
};

struct LL128 {
    static constexpr int kThreads = 32;
    static constexpr int kWords = 4;
    static constexpr int kDataBytes = 960;
    static constexpr int kSlotBytes = 1024;
    using Payload = Value<kWords>;

    // Lanes 7, 15, 23 and 31 carry the flags of two lines, and with them one half each of 16 bytes of data;
    // the others carry 16 bytes in each of two lines. So every access to the message is 16 bytes, aligned.
    static bool holds_flag(int lane) { return (lane & 7) == 7; }
    static bool holds_half(int lane, int half) { return half == 0 || !holds_flag(lane); }
    static int data_offset(int lane, int half) {
        const int line = lane >> 3, place = lane & 7;
        return holds_flag(lane) ? 896 + 16 * line : 448 * half + 16 * (7 * line + place);
    }
    static int slot_offset(int lane) { return 16 * lane; }

    static void store(char* slot, const Payload& value, Flag flag) {
        const u64 mark = u64(flag.signature) << 32 | flag.epoch;
        const bool holds = holds_flag(threadIdx.x & 31);
        store_line_share(slot, value.word[0], holds ? mark : value.word[1]);
        store_line_share(slot + 512, holds ? value.word[1] : value.word[2], holds ? mark : value.word[3]);
    }

    static Arrival load(const char* slot, Payload& value, Flag flag) {
        u64 a, b, c, d;
        load_line_share(slot, a, b);
        load_line_share(slot + 512, c, d);
        const bool holds = holds_flag(threadIdx.x & 31);
        value = {{a, holds ? c : b, c, d}};
        if (!holds) return Arrival::kFresh;
        const u64 mark = u64(flag.signature) << 32 | flag.epoch;
        if (b == mark && d == mark) return Arrival::kFresh;
        const bool foreign = (u32(b) == flag.epoch && b != mark) || (u32(d) == flag.epoch && d != mark);
        return foreign ? Arrival::kForeign : Arrival::kMissing;
    }

    static bool all(bool mine) { return __all_sync(~0u, mine); }
    static bool any(bool mine) { return __any_sync(~0u, mine); }
};

}  // namespace nvrar
