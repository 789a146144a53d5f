/* Loops for each kind of processor, and which of them are for this one.

   A file has its loops as `NAME_any` and, where X86_LOOPS is set, as `NAME_avx2` and `NAME_avx512`, made for the
   targets below. Tests leave out the faster ones: PORTABLE, and AT_MOST_AVX2. */

#ifndef MLXLORA_PROCESSOR_H
#define MLXLORA_PROCESSOR_H

#if defined(__x86_64__) && !defined(PORTABLE)
#define X86_LOOPS
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma")))

static inline int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static inline int has_avx512(void) {
#ifdef AT_MOST_AVX2
    return 0;
#else
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#endif
}

#define FASTEST(name) (has_avx512() ? &name##_avx512 : has_avx2() ? &name##_avx2 : &name##_any)
#else
#define FASTEST(name) (&name##_any)
#endif

#endif
