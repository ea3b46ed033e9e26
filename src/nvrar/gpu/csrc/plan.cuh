// SPDX-License-Identifier: Apache-2.0
// A plan as a type: the device's view of nvrar/plan.py, and of the inbox layout in nvrar/gpu/layout.py.
#pragma once

namespace nvrar {

using u32 = unsigned int;
using u64 = unsigned long long;

enum class Mode { kExchange, kSplit };
// How packets reach the other members of a level: by stores into mapped memory, or by NVSHMEM put.
enum class Transport { kDirect, kPut };

template <Mode kMode_, int kRadix_, Transport kTransport_>
struct Level {
    static constexpr Mode kMode = kMode_;
    static constexpr int kRadix = kRadix_;
    static constexpr Transport kTransport = kTransport_;
};

// The message is cut into kParts innermost parts (the product of the split radices) of `num_units` units
// each. A column is unit u of every part; columns never depend on each other, so a thread (or warp) carries
// one from the input to the output alone, in registers, with no synchronisation between threads.
template <class... Levels>
struct Plan {
    static constexpr int kNumLevels = sizeof...(Levels);  // none for one rank; hence the ends of the tables

    static constexpr Mode mode(int level) {
        constexpr Mode modes[] = {Levels::kMode..., Mode::kExchange};
        return modes[level];
    }
    static constexpr int radix(int level) {
        constexpr int radices[] = {Levels::kRadix..., 1};
        return radices[level];
    }
    static constexpr Transport transport(int level) {
        constexpr Transport transports[] = {Levels::kTransport..., Transport::kDirect};
        return transports[level];
    }
    static constexpr bool uses(Transport transport) { return ((Levels::kTransport == transport) || ...); }
    // Innermost parts in the block that enters a level.
    static constexpr int parts(int level) {
        int count = 1;
        for (int i = level; i < kNumLevels; i++) count *= mode(i) == Mode::kSplit ? radix(i) : 1;
        return count;
    }
    // ... and in what this rank works on from that level inwards.
    static constexpr int own_parts(int level) { return parts(level + 1); }

    // The inbox: for each level an area of one slot per (sender's digit, part) and unit for the
    // reduction, and for a split another for the gather. Areas count slots of one unit index.
    static constexpr int reduce_area(int level) {
        int area = 0;
        for (int i = 0; i < level; i++) area += radix(i) * own_parts(i) * (mode(i) == Mode::kSplit ? 2 : 1);
        return area;
    }
    static constexpr int gather_area(int level) {
        return reduce_area(level) + radix(level) * own_parts(level);
    }

    // Peers are tabled level by level, by digit, this rank's own digit included.
    static constexpr int first_peer(int level) {
        int first = 0;
        for (int i = 0; i < level; i++) first += radix(i);
        return first;
    }
    static constexpr int kNumPeers = first_peer(kNumLevels);
    static constexpr int kParts = parts(0);
};

}  // namespace nvrar
