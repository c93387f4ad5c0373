/* One team of threads for PyTorch and for us.
 *
 * Linking OpenMP here could bring a second runtime into the process (some torch wheels rename theirs), and two
 * teams that spin between their regions fight for the same cores. So nothing is linked: `GOMP_parallel` is looked
 * up in the library that torch itself uses. Without one, work runs on the calling thread. */
#define _GNU_SOURCE
#include "kernels.h"

#include <dlfcn.h>
#include <stddef.h>

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*omp_thread)(void);
static int (*omp_threads)(void);

/* library: path of a loaded library whose dependencies are searched too. Returns 1 when a runtime was found. */
int parallel_use(const char *library)
{
    void *handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle)
        handle = RTLD_DEFAULT;
    *(void **)&gomp_parallel = dlsym(handle, "GOMP_parallel");
    *(void **)&omp_thread = dlsym(handle, "omp_get_thread_num");
    *(void **)&omp_threads = dlsym(handle, "omp_get_num_threads");
    return gomp_parallel && omp_thread && omp_threads;
}

struct job {
    task_fn task;
    void *args;
};

static void run_share(void *data)
{
    struct job *job = data;
    job->task(job->args, omp_thread(), omp_threads());
}

#if __SANITIZE_THREAD__
/* ThreadSanitizer does not see how GNU OpenMP's threads wait for each other; it knows these. */
#include <pthread.h>

struct member {
    struct job *job;
    int thread, threads;
};

static void *run_member(void *data)
{
    struct member *m = data;
    m->job->task(m->job->args, m->thread, m->threads);
    return NULL;
}

static void run_pthreads(struct job *job, int threads)
{
    pthread_t team[MAX_THREADS];
    struct member members[MAX_THREADS];
    for (int i = 0; i < threads; i++) {
        members[i] = (struct member){job, i, threads};
        pthread_create(team + i, NULL, run_member, members + i);
    }
    for (int i = 0; i < threads; i++)
        pthread_join(team[i], NULL);
}
#endif

void parallel_run(task_fn task, void *args, int threads)
{
    if (threads <= 1 || !gomp_parallel || !omp_thread || !omp_threads) {
        task(args, 0, 1);
        return;
    }
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    struct job job = {task, args};
#if __SANITIZE_THREAD__
    run_pthreads(&job, threads);
#else
    gomp_parallel(run_share, &job, (unsigned)threads, 0);
#endif
}
