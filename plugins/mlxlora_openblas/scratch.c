/* Memory that a thread keeps from one product to the next: pages fresh from the system cost more than what is
   computed in them. */

#include "products.h"

#include <pthread.h>
#include <stdlib.h>

enum { LEAST_BYTES = 1 << 20, PAGE = 4096 };

struct buffers {
    size_t sizes[SCRATCH_USES];
    void *memory[SCRATCH_USES];
};

static pthread_key_t key;
static int has_key;

static void free_buffers(void *given) {
    struct buffers *b = given;
    for (int use = 0; use < SCRATCH_USES; use++)
        free(b->memory[use]);
    free(b);
}

static void make_key(void) { has_key = !pthread_key_create(&key, free_buffers); }

static struct buffers *buffers_of_thread(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_key);
    struct buffers *b = has_key ? pthread_getspecific(key) : NULL;
    if (!b && has_key) {
        b = calloc(1, sizeof *b);
        if (b && pthread_setspecific(key, b)) {
            free(b);
            b = NULL;
        }
    }
    return b;
}

void *scratch(enum scratch_use use, size_t size) {
    struct buffers *b = buffers_of_thread();
    if (!b)
        return NULL;
    if (b->sizes[use] < size) {
        free(b->memory[use]);
        size = size < LEAST_BYTES ? LEAST_BYTES : size;
        b->memory[use] = aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE);
        b->sizes[use] = b->memory[use] ? size : 0;
    }
    return b->memory[use];
}
