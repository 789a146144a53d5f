/* The threads of a product.

   The threads of a BLAS share a product out in equal parts and spin until the last of them is done. Where one
   processor is taken by something of higher priority, they take each other's time, and all of it is slower
   than one thread. Here a product is cut into parts, each of which is one thread's, and whoever is free takes
   the next. Who waits sleeps. And where help has cost more time than it saved, because a thread was put aside
   in the middle of its part, products go without it for a while.

   What the parts are must not depend on who does them, or when: then results do not either. */

#define _GNU_SOURCE

#include "products.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

enum { MOST_THREADS = 256 };

/* Nanoseconds: how long a thread looks for more work before it sleeps, for waking it takes as long; for how
   long products go without help, the first time and at most; and how much of what help has saved counts. */
enum { LOOK = 50 * 1000, SHORTEST_PAUSE = 20 * 1000 * 1000, LONGEST_PAUSE = 500 * 1000 * 1000, MOST_CREDIT = 2000 * 1000 };

struct job {
    part_function *do_part;
    const void *work;
    int parts;
    atomic_int next;    /* the first part that nobody has taken */
    atomic_int helpers; /* threads that are at it, without the one that waits for it */
    struct job *behind;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wanted = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static struct job *first_job;       /* the list of jobs with parts that nobody has taken */
static int started, asleep;         /* threads of this file */
static atomic_uint posted;          /* how many jobs there have been */
static atomic_int threads = 1;      /* that a product takes */
static _Atomic int64_t alone_until; /* the time until which products go without help */
static _Atomic int64_t pause_length = SHORTEST_PAUSE;
static _Atomic int64_t credit; /* what help has saved lately */

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Do what parts nobody has taken, and say how many. */
static int do_parts(struct job *job) {
    int count = 0;
    for (int part; (part = atomic_fetch_add(&job->next, 1)) < job->parts; count++)
        job->do_part(job->work, part);
    return count;
}

/* A job that wants help; the lock is held. */
static struct job *open_job(void) {
    for (struct job *job = first_job; job; job = job->behind)
        if (atomic_load(&job->next) < job->parts && atomic_load(&job->helpers) < atomic_load(&threads) - 1)
            return job;
    return NULL;
}

/* Look for another job for a short while; the lock is not held. */
static void look(unsigned seen) {
    for (int64_t end = now() + LOOK; now() < end;)
        for (int i = 0; i < 16; i++) {
            if (atomic_load(&posted) != seen)
                return;
            relax();
        }
}

static void *help(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        struct job *job = open_job();
        if (job) {
            atomic_fetch_add(&job->helpers, 1);
            pthread_mutex_unlock(&lock);
            do_parts(job);
            pthread_mutex_lock(&lock);
            if (atomic_fetch_sub(&job->helpers, 1) == 1) /* from here on, the job may be gone */
                pthread_cond_broadcast(&done);
            continue;
        }
        unsigned seen = atomic_load(&posted);
        pthread_mutex_unlock(&lock);
        look(seen);
        pthread_mutex_lock(&lock);
        if (atomic_load(&posted) == seen) {
            asleep++;
            pthread_cond_wait(&wanted, &lock);
            asleep--;
        }
    }
    return NULL;
}

/* A child of fork(2) has none of the threads, and whatever they held is free. */
static void forget(void) {
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wanted, NULL);
    pthread_cond_init(&done, NULL);
    first_job = NULL;
    started = asleep = 0;
    atomic_store(&alone_until, 0); /* that was learned of other threads */
}

/* Start the threads that are missing; the lock is held. Where the system gives none, there are fewer. */
static void start_helpers(void) {
    static int told;
    if (!told)
        told = !pthread_atfork(NULL, NULL, forget);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads of the program */
    while (told && started < atomic_load(&threads) - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, NULL))
            break;
        pthread_detach(thread);
        started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void post(struct job *job) {
    pthread_mutex_lock(&lock);
    if (started < atomic_load(&threads) - 1)
        start_helpers();
    job->behind = first_job;
    first_job = job;
    atomic_fetch_add(&posted, 1);
    if (asleep)
        pthread_cond_broadcast(&wanted);
    pthread_mutex_unlock(&lock);
}

/* Take the job off the list, and wait until nobody is at it. */
static void finish(struct job *job) {
    pthread_mutex_lock(&lock);
    struct job **place = &first_job;
    while (*place != job)
        place = &(*place)->behind;
    *place = job->behind;
    if (atomic_load(&job->helpers)) {
        pthread_mutex_unlock(&lock);
        for (int64_t end = now() + LOOK; atomic_load(&job->helpers) && now() < end;)
            relax();
        pthread_mutex_lock(&lock);
        while (atomic_load(&job->helpers))
            pthread_cond_wait(&done, &lock);
    }
    pthread_mutex_unlock(&lock);
}

/* Go without help for a while if it costs time. `saved` is by how much a job was done sooner for it. */
static void learn(int64_t saved, int64_t end) {
    int64_t sum = atomic_load(&credit) + saved, length = atomic_load(&pause_length);
    if (sum < 0) {
        atomic_store(&alone_until, end + length);
        atomic_store(&pause_length, 2 * length < LONGEST_PAUSE ? 2 * length : LONGEST_PAUSE);
        sum = 0;
    } else if (sum > MOST_CREDIT) {
        atomic_store(&pause_length, SHORTEST_PAUSE);
        sum = MOST_CREDIT;
    }
    atomic_store(&credit, sum);
}

int pool_threads(void) { return atomic_load(&threads); }

void pool_run(part_function *do_part, const void *work, int parts) {
    struct job job = {.do_part = do_part, .work = work, .parts = parts};
    int64_t start = now();
    if (parts < 2 || atomic_load(&threads) < 2 || start < atomic_load(&alone_until)) {
        do_parts(&job);
        return;
    }
    post(&job);
    int own = do_parts(&job);
    int64_t own_end = now();
    finish(&job);
    int64_t end = now(), alone = own ? (own_end - start) * parts / own : end - start;
    learn(alone - (end - start), end);
}

/* Let a product take so many threads from now on; the first call of one with more starts them. */
EXPORT void mlxlora_set_threads(int count) {
    atomic_store(&threads, count < 1 ? 1 : count > MOST_THREADS ? MOST_THREADS : count);
}
