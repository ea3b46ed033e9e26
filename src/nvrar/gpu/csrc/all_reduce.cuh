// SPDX-License-Identifier: Apache-2.0
// The kernel: every thread (LL) or warp (LL128) carries its columns through the plan on its own.
// nvrar/gpu/jit.py generates the few lines that instantiate it for a plan.
#pragma once

#include "column.cuh"

namespace nvrar {

template <class Packet, class Type, class Op, bool kWhole, class Plan>
inline void all_reduce(const Args<Plan>& args) {
    using Columns = Column<Plan, Packet, Type, Op, Flat<Plan, Packet, Type, kWhole>>;
    const u32 lane = threadIdx.x / Packet::kThreads;
    const u32 first = blockIdx.x * (blockDim.x / Packet::kThreads) + lane;
    const u32 step = gridDim.x * (blockDim.x / Packet::kThreads);
    // Where blocks put, their threads keep step: the loops' bound is the block's.
    const u32 ahead = Plan::uses(Transport::kPut) ? lane : 0;

    wait_for_previous_kernel();
    Columns column(args);
    column.go_to(first, args.num_units);
    typename Columns::Ahead input;
    if constexpr (Columns::kLoadsAhead) column.load_ahead(input);
    const Entry entry = enter(args.control);
    column.enter(entry);
    let_next_kernel_start(args);
    if constexpr (Columns::kLoadsAhead) {
        if (first - ahead < args.num_units) column.send_input(input);
    }
#pragma unroll 1
    for (u32 unit = Columns::kLoadsAhead ? first + step : first; unit - ahead < args.num_units;
         unit += step) {
        column.go_to(unit, args.num_units);
        column.send_input();
    }
#pragma unroll 1
    for (u32 unit = first; unit - ahead < args.num_units; unit += step) {
        column.go_to(unit, args.num_units);
        column.finish();
    }
    column.conclude(first, step);
    leave(args, entry);
}

}  // namespace nvrar
