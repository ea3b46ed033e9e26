// Runs kernels that were compiled against emulation.h.
#include "emulation.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace emulation {

struct Meeting {
    unsigned num_here = 0, number = 0, num_running = 0;
};

struct Warp {
    Meeting meeting;
    Exchange exchange;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Dim idx;
    bool is_done = false;
};

// Blocks that reach each other's shared memory. They are threads of the system, hence the atomics.
struct Cluster {
    std::vector<char*> shared;
    std::vector<std::unique_ptr<char[]>> memory;
    std::atomic<unsigned> num_here{0}, number{0}, num_running{0}, num_begun{0};
};

struct Block {
    Dim idx, dim, grid;
    unsigned rank_in_cluster;
    Cluster* cluster;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Meeting meeting;
    unsigned num_votes = 0;
    Thread* current;
    ucontext_t turns;

    Warp& warp() { return warps[current->idx.x / 32]; }
};

thread_local Block* the_block;

const Dim& thread_idx() { return the_block->current->idx; }
const Dim& block_idx() { return the_block->idx; }
const Dim& block_dim() { return the_block->dim; }
const Dim& grid_dim() { return the_block->grid; }
unsigned cluster_rank() { return the_block->rank_in_cluster; }
unsigned cluster_size() { return unsigned(the_block->cluster->shared.size()); }
char* shared_of(unsigned member) { return the_block->cluster->shared[member]; }
unsigned& num_votes() { return the_block->num_votes; }
Exchange& exchange() { return the_block->warp().exchange; }

void yield() { swapcontext(&the_block->current->context, &the_block->turns); }

static void meet(Meeting& meeting) {
    const unsigned number = meeting.number;
    meeting.num_here++;
    while (meeting.number == number) {
        if (meeting.num_here >= meeting.num_running) {
            meeting.num_here = 0;
            meeting.number++;
        } else {
            yield();
        }
    }
}
void meet_warp() { meet(the_block->warp().meeting); }
void meet_block() { meet(the_block->meeting); }

void meet_cluster() {
    Cluster& cluster = *the_block->cluster;
    const unsigned number = cluster.number;
    cluster.num_here++;
    while (cluster.number == number) {
        unsigned here = cluster.num_here;
        if (here >= cluster.num_running && cluster.num_here.compare_exchange_strong(here, 0))
            cluster.number++;
        else
            yield();
    }
}

struct Call {
    void (*kernel)(const void*);
    const void* args;
    unsigned blocks, threads, cluster, shared_bytes;
};

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr char kLeft = 0x5a;
// A test's own limit cannot end it: signals wait for Python, and Python for the kernel.
constexpr std::chrono::seconds kLongest(100);
std::atomic<unsigned> num_late_stores;

// What travels: puts are on their way for a while, overtake each other, and arrive in any order of words.
struct Put {
    char* to;
    const char* from;
    unsigned long long num_words;
};

struct Network {
    char* heap = nullptr;
    unsigned long long bytes_per_rank = 0;
    std::mutex mutex;
    std::vector<Put> puts;
    std::atomic<bool> is_over{false};

    void deliver(unsigned seed) {
        std::mt19937 random(seed);
        while (true) {
            Put put;
            {
                std::lock_guard lock(mutex);
                if (puts.empty() && is_over) return;
                // Never the last one alone: the others overtake it.
                if (puts.empty() || (puts.size() < 3 && random() % 8)) {
                    put.num_words = 0;
                } else {
                    std::swap(puts[random() % puts.size()], puts.back());
                    put = puts.back();
                    puts.pop_back();
                }
            }
            if (put.num_words == 0) {
                sched_yield();
                continue;
            }
            const unsigned long long turn = random() % put.num_words;
            for (unsigned long long i = 0; i < put.num_words; i++) {
                const unsigned long long at = (i + turn) % put.num_words * 8;
                const auto* from = reinterpret_cast<const unsigned long long*>(put.from + at);
                auto* to = reinterpret_cast<unsigned long long*>(put.to + at);
                __atomic_store_n(to, __atomic_load_n(from, __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
            }
        }
    }
} network;

struct Launch {
    const Call& call;
    unsigned rank, num_ranks, seed;
};

thread_local const Call* the_call;

void run_thread() {
    the_call->kernel(the_call->args);
    Block& block = *the_block;
    block.current->is_done = true;
    block.meeting.num_running--;
    block.warp().meeting.num_running--;
    block.cluster->num_running--;
    setcontext(&block.turns);
}

void run_block(const Launch& launch, unsigned x, Cluster& cluster) {
    const Call& call = launch.call;
    std::mt19937 random(launch.seed * 31 + x);
    Block block;
    block.idx = {x, launch.rank, 0};
    block.dim = {call.threads, 1, 1};
    block.grid = {call.blocks, launch.num_ranks, 1};
    block.rank_in_cluster = x % call.cluster;
    block.cluster = &cluster;
    std::unique_ptr<char[]>& memory = cluster.memory[block.rank_in_cluster];
    memory.reset(new char[call.shared_bytes + 1024]);
    char* const shared = memory.get() + (1024 - reinterpret_cast<size_t>(memory.get()) % 1024);
    memset(shared, 0xa5, call.shared_bytes);  // not to be relied on
    block.threads = std::vector<Thread>(call.threads);
    block.warps = std::vector<Warp>((call.threads + 31) / 32);
    block.meeting.num_running = call.threads;
    the_block = &block;
    the_call = &call;
    for (unsigned i = 0; i < call.threads; i++) {
        Thread& thread = block.threads[i];
        thread.idx = {i, 0, 0};
        thread.stack.reset(new char[kStackBytes]);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = kStackBytes;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_thread, 0);
        block.warps[i / 32].meeting.num_running++;
    }
    // A member may be written to as soon as one runs.
    cluster.shared[block.rank_in_cluster] = shared;
    cluster.num_begun++;
    while (cluster.num_begun < call.cluster) sched_yield();
    const auto deadline = std::chrono::steady_clock::now() + kLongest;
    while (block.meeting.num_running > 0) {
        if (std::chrono::steady_clock::now() > deadline) {
            fprintf(stderr, "block %u of rank %u has not ended within %d s\n", x, launch.rank,
                    int(kLongest.count()));
            abort();
        }
        // Warps in any order, so that no one is always the first.
        const unsigned num_warps = unsigned(block.warps.size()), first = random() % num_warps;
        for (unsigned w = 0; w < num_warps; w++) {
            const unsigned warp = (first + w) % num_warps;
            for (unsigned i = warp * 32; i < std::min(warp * 32 + 32, call.threads); i++) {
                if (block.threads[i].is_done) continue;
                block.current = &block.threads[i];
                swapcontext(&block.turns, &block.current->context);
            }
        }
        sched_yield();
    }
    memset(shared, kLeft, call.shared_bytes);  // nobody may write there any more
}

void run_rank(const Call* calls, unsigned num_calls, unsigned rank, unsigned num_ranks, unsigned seed) {
    std::mt19937 random(seed + rank);
    for (unsigned i = 0; i < num_calls; i++) {
        const Call& call = calls[i];
        if (!call.kernel) continue;
        const Launch launch{call, rank, num_ranks, unsigned(random())};
        std::vector<Cluster> clusters(call.blocks / call.cluster);
        std::vector<std::thread> blocks;
        for (unsigned x = 0; x < call.blocks; x++) {
            Cluster& cluster = clusters[x / call.cluster];
            if (x % call.cluster == 0) {
                cluster.shared.resize(call.cluster);
                cluster.memory.resize(call.cluster);
                cluster.num_running = call.cluster * call.threads;
            }
        }
        for (unsigned x = 0; x < call.blocks; x++)
            blocks.emplace_back(run_block, std::cref(launch), x, std::ref(clusters[x / call.cluster]));
        for (std::thread& block : blocks) block.join();
        for (const Cluster& cluster : clusters)
            for (const char* shared : cluster.shared)
                num_late_stores += std::count(shared, shared + call.shared_bytes, kLeft) != call.shared_bytes;
        if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
    }
}

}  // namespace

void put(char* to, const char* from, unsigned long long num_bytes, unsigned rank) {
    const unsigned long long at = (unsigned long long)(to - network.heap) % network.bytes_per_rank;
    std::lock_guard lock(network.mutex);
    network.puts.push_back({network.heap + rank * network.bytes_per_rank + at, from, num_bytes / 8});
}

}  // namespace emulation

// Every rank makes its calls in order, and is ahead of the others or behind as it happens; `calls` are those
// of rank 0, of rank 1 and on. One without a kernel is left out. Ranks are grid rows. `heap` holds their
// symmetric memory, `bytes_per_rank` after each other. Returns how many blocks' shared memory was written to
// too late.
extern "C" unsigned emulate(const emulation::Call* calls, unsigned num_calls, unsigned num_ranks, char* heap,
                            unsigned long long bytes_per_rank, unsigned seed) {
    using namespace emulation;
    network.heap = heap;
    network.bytes_per_rank = bytes_per_rank;
    network.is_over = false;
    num_late_stores = 0;
    std::thread messenger([&] { network.deliver(seed); });
    std::vector<std::thread> ranks;
    for (unsigned rank = 0; rank < num_ranks; rank++)
        ranks.emplace_back(run_rank, calls + rank * num_calls, num_calls, rank, num_ranks, seed);
    for (std::thread& rank : ranks) rank.join();
    network.is_over = true;
    messenger.join();
    return num_late_stores;
}
