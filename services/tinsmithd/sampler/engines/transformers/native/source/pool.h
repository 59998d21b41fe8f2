/* Threads that go through the same function together, a phase at a time. */
#ifndef TIN_POOL_H
#define TIN_POOL_H

#include <stdatomic.h>
#include <stdint.h>

typedef struct pool pool;

/* What each thread calls: with what was given to `pool_run`, and its number from 0. */
typedef void (*part)(void *given, int thread);

/* NULL where memory or threads lack. */
pool *pool_open(int threads);
void pool_close(pool *all);
int pool_threads(const pool *all);

/* Call a part on every thread, of which the caller is number 0; returns when all are done. */
void pool_run(pool *all, part work, void *given);

/* Within a part: wait until all threads are here. */
void pool_meet(pool *all);
#endif
