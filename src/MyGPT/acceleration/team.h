// The threads that compute a forward pass together.
#pragma once
#include <atomic>
#include <thread>
#if defined(_OPENMP)
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif
#if defined(__x86_64__)
#include <immintrin.h>
inline void pause_cpu() { _mm_pause(); }
#else
inline void pause_cpu() {}
#endif

// A point that no thread passes before all have reached it. A waiting thread spins, because the others arrive within a few
// microseconds. If they do not, which happens if another program has their core, it lets other threads run.
class Barrier {
    static constexpr int SPINS = 2000;  // about 30 microseconds
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};

public:
    void wait(int n_threads) {
        const int before = round.load(std::memory_order_relaxed);  // cannot change until this thread has arrived
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == n_threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(before + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == before; spins++) {
            if (spins < SPINS) pause_cpu();
            else std::this_thread::yield();
        }
    }
};

// One of the threads of an OpenMP parallel region. All of them have the same barrier.
struct Team {
    Barrier& barrier;
    const int thread = omp_get_thread_num(), size = omp_get_num_threads();

    void wait() const {
        if (size > 1) barrier.wait(size);
    }
    // The first of n units of work that belong to this thread, or with `next` to the next thread.
    int64_t first(int64_t n, bool next = false) const { return n * (thread + next) / size; }
};
