/* Threads that spin for some microseconds, and then sleep in the kernel: a phase of a step is short,
 * and the machine is not ours alone. */
#define _GNU_SOURCE
#include "pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SPINS 2000

/* A number that only grows, on which threads wait. */
typedef struct {
    _Alignas(64) atomic_uint value;
    atomic_int sleepers;
} gate;

struct pool {
    gate start, met;
    _Alignas(64) atomic_int arrived;
    int threads;
    int stops;
    part work;
    void *given;
    pthread_t *ids;
};

typedef struct {
    pool *all;
    int thread;
} seat;

static void gate_wait(gate *g, unsigned seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&g->value, memory_order_acquire) != seen) return;
        __builtin_ia32_pause();
    }
    atomic_fetch_add(&g->sleepers, 1);
    while (atomic_load(&g->value) == seen)
        syscall(SYS_futex, &g->value, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&g->sleepers, 1);
}

static void gate_open(gate *g) {
    atomic_fetch_add(&g->value, 1);
    if (atomic_load(&g->sleepers))
        syscall(SYS_futex, &g->value, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void pool_meet(pool *all) {
    if (all->threads == 1) return;
    unsigned seen = atomic_load_explicit(&all->met.value, memory_order_acquire);
    if (atomic_fetch_add(&all->arrived, 1) == all->threads - 1) {
        atomic_store(&all->arrived, 0);
        gate_open(&all->met);
    } else {
        gate_wait(&all->met, seen);
    }
}

static void *sit(void *given) {
    seat own = *(seat *)given;
    free(given);
    unsigned seen = 0;
    for (;;) {
        gate_wait(&own.all->start, seen++);
        if (own.all->stops) return NULL;
        own.all->work(own.all->given, own.thread);
        pool_meet(own.all);
    }
}

static int pool_begin(pool *all, int thread) {
    seat *own = malloc(sizeof *own);
    if (own == NULL) return -1;
    *own = (seat){all, thread};
    int failed = pthread_create(&all->ids[thread], NULL, sit, own);
    if (failed) free(own);
    return failed;
}

pool *pool_open(int threads) {
    pool *all = aligned_alloc(64, (sizeof *all + 63) / 64 * 64);
    if (all == NULL) return NULL;
    *all = (pool){.threads = 1};
    all->ids = calloc((size_t)threads, sizeof *all->ids);
    if (all->ids == NULL) {
        free(all);
        return NULL;
    }
    /* Signals are for the threads of the program that has this one. */
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    int started = 1;
    while (started < threads && pool_begin(all, started) == 0) started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    all->threads = started;
    return all;
}

void pool_close(pool *all) {
    all->stops = 1;
    gate_open(&all->start);
    for (int i = 1; i < all->threads; i++) pthread_join(all->ids[i], NULL);
    free(all->ids);
    free(all);
}

int pool_threads(const pool *all) { return all->threads; }

void pool_run(pool *all, part work, void *given) {
    all->work = work;
    all->given = given;
    if (all->threads > 1) gate_open(&all->start);
    work(given, 0);
    pool_meet(all);
}
