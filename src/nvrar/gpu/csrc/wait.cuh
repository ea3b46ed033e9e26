// SPDX-License-Identifier: Apache-2.0
// What a launch knows, how it learns its epoch, and how every wait ends.
#pragma once

#include "packet.cuh"

namespace nvrar {

// One per communicator and rank, in device memory.
struct Control {
    u32 epoch;    // of the next launch
    u32 arrived;  // blocks of this launch that have read it
    u32 broken;   // 1 from the first failure on
    u32 unused;
};

enum FailureKind : u32 { kNoFailure = 0, kPeerMissing = 1, kOtherCall = 2 };

// One per communicator and rank, in memory that the host reads. Kept in step with nvrar/gpu/kernel.py.
struct Failure {
    u32 kind;  // kNoFailure until all the rest is written
    u32 level;
    u32 digit;  // of the peer
    u32 epoch;
    u32 call;  // the host's number for what was called
};

// What follows the sum in the same launch: the residual is added and the rows are normalised (rows.cuh).
struct Norm {
    const char* residual;
    char* residual_out;
    const char* weight;
    u32 num_rows;
    u32 row_bytes;
    u32 row_units;  // units of a part in a row
    float share;    // of an element in the mean: 1 / their number
    float eps;
};

template <class Plan>
struct Args {
    const char* in;
    char* out;
    u64 num_bytes;
    char* inbox;       // this rank's, first parity
    u64 parity_bytes;  // from one parity to the other
    Control* control;
    Failure* failure;
    char* outbox;      // where packets are packed for put, first parity; symmetric memory
    u32 budget_ticks;  // of every wait
    u32 num_units;
    u32 signature;
    u32 call;
    u32 overlaps;                     // whether the next launch may begin early
    u32 digit[Plan::kNumLevels + 1];  // no array may be empty
    u32 pe[Plan::kNumPeers + 1];
    char* peer[Plan::kNumPeers + 1];  // their inboxes as this rank addresses them
    Norm norm;
};

// 0 is what fresh memory holds, so it is no epoch; the first after 2^32 - 1, which is odd, is 2, so that
// the two workspaces go on alternating.
inline u32 next_epoch(u32 epoch) { return epoch == ~0u ? 2 : epoch + 1; }

// Ticks of 2^20 ns, about a millisecond.
inline u32 now_ticks() { return u32(now_ns() >> 20); }

// From here on the next kernel on the stream may be set up; it waits for the end of this one all the same.
// Large launches leave it be: the next one's blocks would take the room of another communicator's.
template <class Plan>
inline void let_next_kernel_start(const Args<Plan>& args) {
    if (args.overlaps) launch_dependents();
}

struct Entry {
    u32 epoch;
    bool broken;
    u32 ticket;  // on thread 0; its atomic is on its way while the packets are
};

// Every block reads the epoch, then takes a ticket; the one that took the last advances the epoch when it
// leaves. All have read it by then, and nobody waits for the ticket: counting blocks at the end instead
// costs 0.9 us a call.
inline Entry enter(Control* control) {
    __shared__ u32 epoch, broken;
    u32 ticket = 0;
    if (threadIdx.x == 0) {
        u32 arrived, unused;
        load_16(reinterpret_cast<const char*>(control), epoch, arrived, broken, unused);
    }
    __syncthreads();
    if (threadIdx.x == 0) ticket = atomicAdd(&control->arrived, 1u) + 1;
    return {epoch, broken != 0, ticket};
}

// A launch that hears of no peer uses up no epoch: two calls that do would else follow each other in the same
// inbox, and nothing would tell that the peers are through with the first.
template <class Plan>
inline void leave(const Args<Plan>& args, const Entry& entry) {
    if (entry.ticket != gridDim.x) return;
    args.control->arrived = 0;
    if constexpr (Plan::kNumLevels > 0) args.control->epoch = next_epoch(entry.epoch);
}

// What one wait found.
struct Found {
    Arrival arrival;  // the worst that was seen
    u32 digit;        // of whom
};

// The one loop of the library that waits. `look` looks once; it is called until all is there, or until a
// packet is foreign, the budget is spent, or another wait of this communicator has failed: then the arrival
// is not kFresh on some thread of the packet, and on none may the data be used.
template <class Packet, class Plan, class Look>
inline bool wait_for(const Args<Plan>& args, Found& found, Look look) {
    u32 deadline = 0;
    for (u32 looks = 1;; looks++) {
        found = {Arrival::kFresh, 0};
        look(found);
        if (Packet::all(found.arrival == Arrival::kFresh)) return true;
        if (looks % 256 != 0) continue;
        const u32 now = now_ticks();
        if (deadline == 0) deadline = (now + args.budget_ticks) | 1;
        // Only now and then: a packet that is half there may look foreign for a moment.
        const bool over = found.arrival == Arrival::kForeign || int(now - deadline) >= 0 ||
                          *reinterpret_cast<volatile u32*>(&args.control->broken);
        if (Packet::any(over)) return false;
    }
}

// Leaves word for the host, the first time on this rank. From then on no kernel of it waits.
template <class Plan>
inline void report(const Args<Plan>& args, u32 epoch, u32 level, Found found) {
    if (found.arrival == Arrival::kFresh || atomicExch(&args.control->broken, 1u) != 0) return;
    volatile Failure* failure = args.failure;
    failure->level = level;
    failure->digit = found.digit;
    failure->epoch = epoch;
    failure->call = args.call;
    __threadfence_system();
    failure->kind = found.arrival == Arrival::kForeign ? kOtherCall : kPeerMissing;
}

}  // namespace nvrar
