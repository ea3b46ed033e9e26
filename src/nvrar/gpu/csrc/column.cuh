// SPDX-License-Identifier: Apache-2.0
// One column through all levels: load, send, wait, add in digit order, go inwards, come back out, store.
#pragma once

#include "message.cuh"

#ifdef NVRAR_PUT
#include "put.cuh"
#endif

namespace nvrar {

// Values of parts in registers.
template <class Payload, int kCount>
struct Registers {
    static constexpr bool kIndexed = false;
    Payload value[kCount];

    Payload get(int part) const {
        Payload found = value[0];
#pragma unroll
        for (int i = 1; i < kCount; i++)  // a run-time index would move the array to local memory
            if (i == part) found = value[i];
        return found;
    }
    void set(int part, const Payload& found) {
#pragma unroll
        for (int i = 0; i < kCount; i++)
            if (i == part) value[i] = found;
    }
};

// Tensor says where the message is and what becomes of its sum: Flat or Rows.
template <class Plan, class Packet, class Type, class Op, class Tensor>
class Column {
    using Payload = typename Packet::Payload;

  public:
    // The input of a column, if it is small enough to be held while the epoch is on its way.
    static constexpr bool kLoadsAhead = Plan::kParts * Packet::kWords <= 16;
    using Ahead = Registers<Payload, kLoadsAhead ? Plan::kParts : 1>;

    // Packets of so many peers are looked at together, so that their loads are in flight at the same time.
    static constexpr int most_looks(int own_parts) { return Packet::kWords == 1 ? 8 : own_parts > 1 ? 2 : 4; }

    explicit Column(const Args<Plan>& args) : args_(args), tensor_(args) {}

    void enter(const Entry& entry) {
        flag_ = {entry.epoch, args_.signature};
        parity_ = entry.epoch % 2 ? args_.parity_bytes : 0;
        ok_ = !entry.broken;
    }

    // Columns are taken one after the other, up to `end`. In a kernel that puts, all threads of a block take
    // the same number, and those beyond the last column only keep step.
    void go_to(u32 unit, u32 end) {
        unit_ = unit;
        end_ = end;
        live_ = unit < end;
    }
    Tensor& tensor() { return tensor_; }
    bool ok() const { return ok_; }
    bool live() const { return live_; }

    void load_ahead(Ahead& input) const {
#pragma unroll
        for (int part = 0; part < Plan::kParts; part++) input.value[part] = load(part);
    }

    // Sends the input to the peers of the first level. Separate, so that all columns of a thread are on
    // their way before it waits for the first.
    void send_input(const Ahead& input) {
        if constexpr (Plan::kNumLevels > 0) send<0>(input);
    }
    void send_input() {
        if constexpr (Plan::kNumLevels > 0) send<0>(Whole{*this});
    }

    void finish() {
        Whole message{*this};
        if constexpr (Plan::kNumLevels > 0)
            descend<0>(message);
        else
            message.set(0, message.get(0));
    }

    // After the last column. Nothing that looks like a result may stand where the result is not to be had:
    // poisons this thread's columns from the failed one on, `step` apart, the first being `first`.
    void conclude(u32 first, u32 step) const {
        if (!ok_) give_up(first, step);
    }
    // Leaves word of the failure, if there was one on this thread.
    void leave_word() const {
        if (!ok_) report(args_, flag_.epoch, failed_level_, failed_);
    }

  private:
    // The block that enters the first level: the message itself, in memory.
    struct Whole {
        static constexpr bool kIndexed = true;
        Column& column;
        Payload get(int part) const { return column.load(part); }
        void set(int part, const Payload& value) { column.store(part, value); }
    };

    template <int I, class Block>
    void descend(Block& block) {
        if constexpr (I < Plan::kNumLevels) {
            constexpr int kOwn = Plan::own_parts(I);
            constexpr bool kSplit = Plan::mode(I) == Mode::kSplit;
            const int first = kSplit ? args_.digit[I] * kOwn : 0;
            Registers<Payload, kOwn> own;
            if constexpr (I > 0) send<I>(block);
#pragma unroll
            for (int part = 0; part < kOwn; part++) own.value[part] = block.get(first + part);
#pragma unroll
            for (int part = 0; part < kOwn; part++) reduce<I>(part, own.value[part]);
            descend<I + 1>(own);
            if constexpr (kSplit) send_finished<I>(own);
#pragma unroll
            for (int part = 0; part < kOwn; part++) block.set(first + part, own.value[part]);
            if constexpr (kSplit) gather<I>(block);
        }
    }

    // -- sending -------------------------------------------------------------------------------------

    template <int I, class Block>
    void send(const Block& block) {
        constexpr int kRadix = Plan::radix(I), kOwn = Plan::own_parts(I);
        constexpr bool kSplit = Plan::mode(I) == Mode::kSplit;
        const int digit = args_.digit[I];
        jitter(2 * I);
        if constexpr (!kSplit) {
#pragma unroll
            for (int part = 0; part < kOwn; part++) {
                const Payload value = block.get(part);
                to_all<I>(Plan::reduce_area(I), part, value);
            }
        } else {
#pragma unroll(Block::kIndexed ? 1 : kRadix)
            for (int i = 0; i < kRadix; i++) {
                // Start behind oneself, so that not everybody writes to the same peer at once.
                const int peer = Block::kIndexed ? (digit + 1 + i) % kRadix : i;
                if (peer == digit) continue;
#pragma unroll
                for (int part = 0; part < kOwn; part++)
                    to_one<I>(peer, Plan::reduce_area(I), part, peer, block.get(peer * kOwn + part));
            }
        }
        post<I>(Plan::reduce_area(I), kSplit);
    }

    template <int I>
    void send_finished(const Registers<Payload, Plan::own_parts(I)>& own) {
        jitter(2 * I + 1);
#pragma unroll
        for (int part = 0; part < Plan::own_parts(I); part++)
            to_all<I>(Plan::gather_area(I), part, own.value[part]);
        post<I>(Plan::gather_area(I), false);
    }

    // The same packet to every other member.
    template <int I>
    void to_all(int area, int part, const Payload& value) {
        const int digit = args_.digit[I];
        if constexpr (Plan::transport(I) == Transport::kPut) {
            pack(slot<I>(area, digit, part), value);
        } else {
#pragma unroll(Plan::radix(I) <= 8 ? Plan::radix(I) : 4)
            for (int i = 1; i < Plan::radix(I); i++) {
                const int peer = digit + i < Plan::radix(I) ? digit + i : digit + i - Plan::radix(I);
                store<I>(peer, slot<I>(area, digit, part), value);
            }
        }
    }

    template <int I>
    void to_one(int peer, int area, int part, int outbox_digit, const Payload& value) {
        if constexpr (Plan::transport(I) == Transport::kPut)
            pack(slot<I>(area, outbox_digit, part), value);
        else
            store<I>(peer, slot<I>(area, args_.digit[I], part), value);
    }

    template <int I>
    void store(int peer, u64 slot, const Payload& value) {
        if (live_ && ok_)
            Packet::store(args_.peer[Plan::first_peer(I) + peer] + parity_ + slot, value, flag_);
    }

    // The outbox mirrors the inbox; what goes to one member lies at that member's digit, what goes to all
    // at this rank's own.
    void pack(u64 slot, const Payload& value) {
        if (live_) Packet::store(args_.outbox + parity_ + slot, value, ok_ ? flag_ : Flag{0, 0});
    }

    template <int I>
    void post(int area, bool each_its_own) {
#ifdef NVRAR_PUT
        if constexpr (Plan::transport(I) == Transport::kPut) {
            const int digit = args_.digit[I];
            const u32 first_unit = unit_ - threadIdx.x / Packet::kThreads;
            if (first_unit >= end_) return;
            const u32 most = blockDim.x / Packet::kThreads, left = end_ - first_unit;
            const u64 num_bytes = u64(left < most ? left : most) * Packet::kSlotBytes;
            __syncthreads();  // the block's packets are packed; one put may take them all
            for (int i = 1; i < Plan::radix(I); i++) {
                const int peer = (digit + i) % Plan::radix(I);
                for (int part = 0; part < Plan::own_parts(I); part++) {
                    const u64 to = row<I>(area, digit, part) + u64(first_unit) * Packet::kSlotBytes;
                    const u64 from = row<I>(area, each_its_own ? peer : digit, part) +
                                     u64(first_unit) * Packet::kSlotBytes;
                    put_block(args_.inbox + parity_ + to, args_.outbox + parity_ + from, num_bytes,
                              args_.pe[Plan::first_peer(I) + peer]);
                }
            }
        }
#endif
    }

    // -- receiving -----------------------------------------------------------------------------------

    // Looks at the packets of `area` from the peers with digits first .. first + kLooks - 1 until all are
    // there.
    template <int I, int kLooks>
    void receive(int area, int part, int first, Payload (&got)[kLooks]) {
        if (!ok_ || !live_) return;
        const int digit = args_.digit[I];
        const char* inbox = args_.inbox + parity_;
        Found found;
        ok_ = wait_for<Packet>(args_, found, [&](Found& worst) {
#pragma unroll
            for (int i = 0; i < kLooks; i++) {
                const int peer = first + i;
                if (kLooks > 1 && (peer == digit || peer >= Plan::radix(I))) continue;
                const Arrival arrival = Packet::load(inbox + slot<I>(area, peer, part), got[i], flag_);
                if (arrival == Arrival::kFresh || worst.arrival == Arrival::kForeign) continue;
                worst = {arrival, u32(peer)};
            }
        });
        if (!ok_) {
            failed_level_ = I;
            failed_unit_ = unit_;
            failed_ = found;
        }
    }

    // Adds what the members hold of a part, in the order of their digits, whoever does the adding.
    template <int I>
    void reduce(int part, Payload& own) {
        constexpr int kRadix = Plan::radix(I), kMost = most_looks(Plan::own_parts(I));
        constexpr int kLooks = kRadix < kMost ? kRadix : kMost;
        Accumulator<Type, Op, Packet::kWords> total;
        if constexpr (kRadix == 2 && Op::kCommutes) {  // two make the same sum in either order
            Payload got[1];
            receive<I, 1>(Plan::reduce_area(I), part, 1 - args_.digit[I], got);
            total.start(own.word);
            total.add(got[0].word);
        } else {
#pragma unroll 1
            for (int first = 0; first < kRadix; first += kLooks) {
                Payload got[kLooks];
                receive<I, kLooks>(Plan::reduce_area(I), part, first, got);
#pragma unroll
                for (int i = 0; i < kLooks; i++) {
                    const int peer = first + i;
                    if (peer >= kRadix) break;
                    Payload next = got[i];
                    if (peer == int(args_.digit[I])) next = own;
                    if (peer == 0)
                        total.start(next.word);
                    else
                        total.add(next.word);
                }
            }
        }
        total.finish(own.word);
    }

    template <int I, class Block>
    void gather(Block& block) {
        constexpr int kRadix = Plan::radix(I), kMost = most_looks(Plan::own_parts(I));
        constexpr int kLooks = kRadix < kMost ? kRadix : kMost;
#pragma unroll
        for (int part = 0; part < Plan::own_parts(I); part++) {
#pragma unroll(Block::kIndexed ? 1 : kRadix)
            for (int first = 0; first < kRadix; first += kLooks) {
                Payload got[kLooks];
                receive<I, kLooks>(Plan::gather_area(I), part, first, got);
#pragma unroll
                for (int i = 0; i < kLooks; i++) {
                    const int peer = first + i;
                    if (peer != int(args_.digit[I]) && peer < kRadix)
                        block.set(peer * Plan::own_parts(I) + part, got[i]);
                }
            }
        }
    }

    // -- addresses -----------------------------------------------------------------------------------

    template <int I>
    u64 row(int area, int digit, int part) const {
        return u64(area + digit * Plan::own_parts(I) + part) * args_.num_units * Packet::kSlotBytes;
    }

    template <int I>
    u64 slot(int area, int digit, int part) const {
        return row<I>(area, digit, part) + u64(unit_) * Packet::kSlotBytes +
               Packet::slot_offset(threadIdx.x % Packet::kThreads);
    }

    void give_up(u32 first, u32 step) const {
        leave_word();
        Payload value;
        for (u64& word : value.word) word = Type::kPoison;
        for (u32 unit = failed_unit_ ? failed_unit_ : first; unit < args_.num_units; unit += step)
            for (u32 part = 0; part < Plan::kParts; part++) tensor_.store(part, unit, value);
    }

    Payload load(int part) const { return tensor_.load(part, unit_, live_); }

    void store(int part, const Payload& value) {
        if (live_ && ok_) tensor_.store(part, unit_, value);
    }

    // Tests ask for random delays in front of every send, to meet as many interleavings as they can.
    void jitter(int place) const {
#ifdef NVRAR_JITTER_NS
        u32 mix = (args_.digit[0] * 31 + blockIdx.x) * 0x9e3779b9u ^ flag_.epoch * 0x85ebca6bu ^
                  (place + 17 * blockIdx.y) * 0xc2b2ae35u;
        mix ^= mix >> 15;
        mix *= 0x2c1b3c6du;
        mix ^= mix >> 12;
        if (mix % 4 == 0) {
            const u64 end = now_ns() + mix % NVRAR_JITTER_NS;
            while (now_ns() < end) {}
        }
#endif
    }

    const Args<Plan>& args_;
    Tensor tensor_;
    Flag flag_ = {};
    u64 parity_ = 0;
    u32 unit_ = 0;
    u32 end_ = 0;
    bool live_ = true;
    bool ok_ = true;  // false from the first wait that failed on; from then on nothing is sent or stored
    u32 failed_level_ = 0;
    u32 failed_unit_ = 0;
    Found failed_ = {Arrival::kFresh, 0};
};

}  // namespace nvrar
