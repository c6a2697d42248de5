/* The forward pass of model.py with int8 weights, for one token or for several at once.

core/native.py compiles this file with the machine's C compiler. Every compiler and CPU gives the same bits:
sums of floats have a fixed order, products are not fused with sums (-ffp-contract=off), and libm is not used.

A matrix has int8 weights and one scale per row. Before a vector is multiplied by it, the vector is rounded to
int16, with one scale of its own, so that products are sums of integers, which compilers turn into the fastest
instructions of a CPU. What rounding took away is a second int16 vector. Everything else is float32.

The caller owns all memory: it asks for sizes, allocates, and passes pointers. Names are those of model.py. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_ROWS 32  // tokens that are read at once; each weight is read from memory once for all of them
#define MAX_THREADS 64
#define LEAST_WORK 30000  // multiplications that are worth a second thread
#define CHUNK_WORK (1 << 17)  // multiplications that a thread takes at once
#define LOOK_AHEAD 4096  // bytes; a CPU alone does not fetch weights early enough

enum { RMS, LAYER };                       // config.norm
enum { ROPE, LEARNED, SINUSOIDAL };        // config.position
enum { SWIGLU, GELU, RELU, RELU2 };        // config.mlp
enum { SET, ADD };                         // what `multiply` does with its result

typedef struct {
    int32_t n_layer, n_head, n_kv_head, n_embd, block_size, vocab_size, mlp_width;
    int32_t norm, position, mlp;
    int32_t qk_norm, bias, tie_embeddings;
    float norm_eps;
} Config;

typedef struct {
    int n_rows, n_columns;
    const int8_t *weights;  // (n_rows, n_columns)
    const float *scales;    // (n_rows)
    const float *bias;      // (n_rows), or NULL
} Matrix;

typedef struct {
    const float *weight, *bias;  // bias may be NULL
} Norm;

typedef struct {
    Norm attn_norm, q_norm, k_norm, mlp_norm;
    Matrix qkv;   // queries, keys and values in one product
    Matrix proj;
    Matrix up;    // swiglu: gate and up in one product
    Matrix down;  // mlp.proj
} Layer;

typedef struct Engine Engine;
typedef void Task(Engine *e, int index, int thread);

typedef struct {
    int n_threads;  // threads besides the caller's
    pthread_t threads[MAX_THREADS];
    pthread_mutex_t mutex;
    pthread_cond_t wake_up;
    atomic_int is_awake, is_closing, n_numbered;
    Task *task;
    atomic_int n_left, n_done;  // indices of the task that nobody has taken, and that are done
} Pool;

struct Engine {
    Config config;
    int head_dim, n_sequences, n_threads;

    Matrix embedding, position, head;
    Layer *layers;
    Norm norm;
    float *position_table;  // rope: (block_size, head_dim), cos, then sin; sinusoidal: (block_size, n_embd)
    float *keys, *values;   // (n_layer, n_sequences, n_kv_head, block_size, head_dim)

    // the rows, each a token, that are read now
    int n_rows;
    int sequence_of[MAX_ROWS], position_of[MAX_ROWS];
    float *x;         // (MAX_ROWS, n_embd), the residual stream
    float *qkv;       // (MAX_ROWS, qkv_width)
    float *attended;  // (MAX_ROWS, n_embd)
    float *hidden;    // (MAX_ROWS, up_width)
    float *scores;    // (n_threads, block_size)
    float *normed;    // (n_threads, n_embd)

    // what the next matrix is multiplied with
    int widest;
    int16_t *rounded;  // (MAX_ROWS, 2, widest): whole numbers, then the rest in units of 1 / largest_rounded
    float rounded_scale[MAX_ROWS];

    // arguments of the current task
    int layer;
    const Norm *task_norm;
    const Matrix *matrix;
    float *out;  // (n_rows, matrix->n_rows)
    int adds_to_out;
    int chunk_size;  // rows of the matrix

    Pool pool;
};


// memory ----------------------------------------------------------------------

/* Memory is handed out from `start` on. If start is 0, the bytes are only counted. */
typedef struct {
    uintptr_t start;
    size_t n_bytes;
} Arena;

static void *take(Arena *arena, size_t count, size_t size) {
    uintptr_t address = arena->start + arena->n_bytes;
    arena->n_bytes += (count * size + 63) / 64 * 64;
    return (void *)address;
}

static float *take_floats(Arena *arena, size_t count) { return take(arena, count, sizeof(float)); }

static Matrix take_matrix(Arena *arena, int n_rows, int n_columns, int has_bias) {
    Matrix matrix = {n_rows, n_columns, NULL, NULL, NULL};
    matrix.weights = take(arena, (size_t)n_rows * n_columns, 1);
    matrix.scales = take_floats(arena, n_rows);
    if (has_bias) matrix.bias = take_floats(arena, n_rows);
    return matrix;
}

static Norm take_norm(Arena *arena, const Config *c, int width) {
    Norm norm = {take_floats(arena, width), NULL};
    if (c->norm == LAYER && c->bias) norm.bias = take_floats(arena, width);
    return norm;
}

static int head_dim(const Config *c) { return c->n_embd / c->n_head; }
static int qkv_width(const Config *c) { return (c->n_head + 2 * c->n_kv_head) * head_dim(c); }
static int up_width(const Config *c) { return c->mlp == SWIGLU ? 2 * c->mlp_width : c->mlp_width; }

static void take_layer(Arena *arena, const Config *c, Layer *layer) {
    layer->attn_norm = take_norm(arena, c, c->n_embd);
    layer->qkv = take_matrix(arena, qkv_width(c), c->n_embd, c->bias);
    if (c->qk_norm) {
        layer->q_norm = take_norm(arena, c, head_dim(c));
        layer->k_norm = take_norm(arena, c, head_dim(c));
    }
    layer->proj = take_matrix(arena, c->n_embd, c->n_embd, c->bias);
    layer->mlp_norm = take_norm(arena, c, c->n_embd);
    layer->up = take_matrix(arena, up_width(c), c->n_embd, c->bias);
    layer->down = take_matrix(arena, c->n_embd, c->mlp_width, c->bias);
}

/* Sets the pointers of e to its weights, which are at arena->start in this order. */
static void take_weights(Arena *arena, Engine *e) {
    const Config *c = &e->config;
    Layer unused;
    e->embedding = take_matrix(arena, c->vocab_size, c->n_embd, 0);
    if (c->position == LEARNED) e->position = take_matrix(arena, c->block_size, c->n_embd, 0);
    for (int i = 0; i < c->n_layer; i++) take_layer(arena, c, e->layers ? &e->layers[i] : &unused);
    e->norm = take_norm(arena, c, c->n_embd);
    e->head = e->embedding;
    if (!c->tie_embeddings) e->head = take_matrix(arena, c->vocab_size, c->n_embd, 0);
}

/* Sets the pointers of e to the memory that it computes in. */
static void take_buffers(Arena *arena, Engine *e) {
    const Config *c = &e->config;
    if (c->position == ROPE) e->position_table = take_floats(arena, (size_t)c->block_size * e->head_dim);
    if (c->position == SINUSOIDAL) e->position_table = take_floats(arena, (size_t)c->block_size * c->n_embd);
    size_t kv_size = (size_t)c->n_layer * e->n_sequences * c->n_kv_head * c->block_size * e->head_dim;
    e->keys = take_floats(arena, kv_size);
    e->values = take_floats(arena, kv_size);
    e->x = take_floats(arena, (size_t)MAX_ROWS * c->n_embd);
    e->qkv = take_floats(arena, (size_t)MAX_ROWS * qkv_width(c));
    e->attended = take_floats(arena, (size_t)MAX_ROWS * c->n_embd);
    e->hidden = take_floats(arena, (size_t)MAX_ROWS * up_width(c));
    e->scores = take_floats(arena, (size_t)e->n_threads * c->block_size);
    e->normed = take_floats(arena, (size_t)e->n_threads * c->n_embd);
    e->widest = c->mlp_width > c->n_embd ? c->mlp_width : c->n_embd;
    e->rounded = take(arena, (size_t)MAX_ROWS * 2 * e->widest, sizeof(int16_t));
}

static Engine make_engine(const Config *config, int n_sequences, int n_threads) {
    Engine e = {.config = *config, .head_dim = head_dim(config), .n_sequences = n_sequences};
    e.n_threads = n_threads;
    return e;
}

/* Returns the size of the weights in bytes. */
size_t weights_size(const Config *config) {
    Arena arena = {0, 0};
    Engine e = make_engine(config, 1, 1);
    take_weights(&arena, &e);
    return arena.n_bytes;
}

/* Returns the size of an engine in bytes, without its weights. */
size_t engine_size(const Config *config, int n_sequences, int n_threads) {
    Arena arena = {0, 0};
    Engine e = make_engine(config, n_sequences, n_threads);
    take(&arena, 1, sizeof(Engine));
    take(&arena, config->n_layer, sizeof(Layer));
    take_buffers(&arena, &e);
    return arena.n_bytes;
}


// arithmetic ------------------------------------------------------------------

/* Returns the sum of w[i] * x[i]. It must be below 2^31: see `largest_rounded`. */
static int32_t dot(const int8_t *w, const int16_t *x, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += w[i] * x[i];
    return sum;
}

/* Sets sums[v] to the dot product of w with each of the vectors at x, which are `stride` numbers apart.
   Four of them are done at once, so that each weight is loaded once for all four. */
static void dot_all(const int8_t *w, const int16_t *x, int n_vectors, size_t stride, int n, int32_t *sums) {
    int v = 0;
    for (; v + 4 <= n_vectors; v += 4) {
        const int16_t *x0 = x + v * stride, *x1 = x0 + stride, *x2 = x1 + stride, *x3 = x2 + stride;
        int32_t sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
        for (int i = 0; i < n; i++) {
            sum0 += w[i] * x0[i];
            sum1 += w[i] * x1[i];
            sum2 += w[i] * x2[i];
            sum3 += w[i] * x3[i];
        }
        sums[v] = sum0;
        sums[v + 1] = sum1;
        sums[v + 2] = sum2;
        sums[v + 3] = sum3;
    }
    for (; v < n_vectors; v++) sums[v] = dot(w, x + v * stride, n);
}

/* The sums below are eight sums side by side, one vector instruction, so their order is always the same. */
static float add_lanes(const float *sums) {
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

static float sum_floats(const float *x, int n) {
    float sums[8] = {0};
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int lane = 0; lane < 8; lane++) sums[lane] += x[i + lane];
    for (int lane = 0; i < n; i++, lane++) sums[lane] += x[i];
    return add_lanes(sums);
}

static float dot_floats(const float *a, const float *b, int n) {
    float sums[8] = {0};
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int lane = 0; lane < 8; lane++) sums[lane] += a[i + lane] * b[i + lane];
    for (int lane = 0; i < n; i++, lane++) sums[lane] += a[i] * b[i];
    return add_lanes(sums);
}

/* Returns the largest x[i] or -x[i]. */
static float largest_size(const float *x, int n) {
    float largest[8] = {0};
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int lane = 0; lane < 8; lane++) {
            float size = __builtin_fabsf(x[i + lane]);
            largest[lane] = size > largest[lane] ? size : largest[lane];
        }
    }
    for (; i < n; i++) {
        float size = __builtin_fabsf(x[i]);
        largest[0] = size > largest[0] ? size : largest[0];
    }
    for (int lane = 1; lane < 8; lane++) largest[0] = largest[lane] > largest[0] ? largest[lane] : largest[0];
    return largest[0];
}

/* Rounds to the nearest integer; |x| is at most 2^22. Floats above 2^23 have no fraction. */
static inline float nearest(float x) {
    const float big = 12582912.0f;  // 1.5 * 2^23
    return (x + big) - big;
}

/* Returns x, or the nearer of the two ends if it is not between them. */
static inline float clamp(float x, float lowest, float highest) {
    x = x > lowest ? x : lowest;
    return x < highest ? x : highest;
}

/* Returns e^x with a relative error of at most 3e-7, for x between -87 and 87. */
static inline float exponential(float x) {
    float log2 = clamp(x, -87.0f, 87.0f) * 1.4426950408889634f;  // e^x = 2^(x / ln 2)
    float whole = nearest(log2);
    float rest = log2 - whole;
    float power = 1.0f + rest * (0.6931472f + rest * (0.24022651f + rest * (0.05550411f
                + rest * (0.009618129f + rest * 0.0013333558f))));
    union { float value; int32_t bits; } result = {power};
    result.bits += (int32_t)whole * (1 << 23);  // the bits above 23 are the exponent
    return result.value;
}

/* Sets out[i] = exp(factor * (x[i] - highest)) and returns their sum. */
static float exponentials(const float *x, float *out, int n, float highest, float factor) {
    for (int i = 0; i < n; i++) out[i] = exponential(factor * (x[i] - highest));
    return sum_floats(out, n);
}

static void normalize(const Config *c, const Norm *norm, const float *x, float *out, int n) {
    float mean = c->norm == LAYER ? sum_floats(x, n) / n : 0;
    for (int i = 0; i < n; i++) out[i] = x[i] - mean;
    float scale = 1 / __builtin_sqrtf(dot_floats(out, out, n) / n + c->norm_eps);
    for (int i = 0; i < n; i++) out[i] = out[i] * scale * norm->weight[i];
    if (norm->bias)
        for (int i = 0; i < n; i++) out[i] += norm->bias[i];
}

/* Returns the largest integer to which n numbers are rounded, so that the sums of `dot` fit into 32 bits. */
static float largest_rounded(int n) {
    int32_t largest = INT32_MAX / 127 / n;
    return largest < INT16_MAX ? largest : INT16_MAX;
}

/* Rounds the n numbers of x to e->rounded. */
static void round_row(Engine *e, int row, const float *x, int n) {
    int16_t *rounded = e->rounded + (size_t)row * 2 * e->widest, *left = rounded + e->widest;
    float highest = largest_rounded(n);
    float factor = highest / (largest_size(x, n) + 1e-30f);
    for (int i = 0; i < n; i++) {
        float exact = clamp(x[i] * factor, -highest, highest);
        float whole = nearest(exact);
        rounded[i] = (int16_t)whole;
        left[i] = (int16_t)nearest((exact - whole) * highest);
    }
    e->rounded_scale[row] = 1 / factor;
}


// tasks: what is done in parallel, once for each index -------------------------

/* Does what is left of the current task. An index below 0 means that nothing is left. As the count goes down
   and is set last, a thread that comes late takes an index of the next task, and then reads that task. */
static void work_on_task(Engine *e, int thread) {
    Pool *pool = &e->pool;
    while (atomic_load(&pool->n_left) > 0) {
        int i = atomic_fetch_sub(&pool->n_left, 1) - 1;
        if (i < 0) return;
        pool->task(e, i, thread);
        atomic_fetch_add(&pool->n_done, 1);
    }
}

/* Waits actively for a moment; lets other programs run if it takes longer. */
static void wait_a_moment(int *n_waits) {
    *n_waits += 1;
    if (*n_waits % 256 == 0) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
}

/* Runs task(e, i, thread) for each i below count. work: multiplications that it takes in all. */
static void in_parallel(Engine *e, Task *task, int count, size_t work) {
    Pool *pool = &e->pool;
    if (pool->n_threads == 0 || count == 1 || work < LEAST_WORK) {
        for (int i = 0; i < count; i++) task(e, i, 0);
        return;
    }
    pool->task = task;
    atomic_store(&pool->n_done, 0);
    atomic_store(&pool->n_left, count);
    work_on_task(e, 0);
    int n_waits = 0;
    while (atomic_load(&pool->n_done) < count) wait_a_moment(&n_waits);
}

/* Lets the threads wait actively for tasks. */
static void wake_threads(Engine *e) {
    if (e->pool.n_threads == 0) return;
    pthread_mutex_lock(&e->pool.mutex);
    atomic_store(&e->pool.is_awake, 1);
    pthread_cond_broadcast(&e->pool.wake_up);
    pthread_mutex_unlock(&e->pool.mutex);
}

/* Lets the threads sleep until the next token. */
static void rest_threads(Engine *e) { atomic_store(&e->pool.is_awake, 0); }

static void *run_thread(void *engine) {
    Engine *e = engine;
    Pool *pool = &e->pool;
    int thread = atomic_fetch_add(&pool->n_numbered, 1) + 1;
    int n_waits = 0;
    while (!atomic_load(&pool->is_closing)) {
        if (atomic_load(&pool->is_awake)) {
            work_on_task(e, thread);
            wait_a_moment(&n_waits);
            continue;
        }
        pthread_mutex_lock(&pool->mutex);
        while (!atomic_load(&pool->is_awake) && !atomic_load(&pool->is_closing))
            pthread_cond_wait(&pool->wake_up, &pool->mutex);
        pthread_mutex_unlock(&pool->mutex);
    }
    return NULL;
}

static void start_threads(Engine *e) {
    Pool *pool = &e->pool;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake_up, NULL);
    while (pool->n_threads < e->n_threads - 1) {
        pthread_t *thread = &pool->threads[pool->n_threads];
        if (pthread_create(thread, NULL, run_thread, e) != 0) return;  // fewer will do
        pool->n_threads++;
    }
}

/* Ends the threads of an engine, whose memory may be freed afterwards. */
void engine_close(Engine *e) {
    Pool *pool = &e->pool;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->is_closing, 1);
    pthread_cond_broadcast(&pool->wake_up);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->n_threads; i++) pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->wake_up);
}


// matrix products -------------------------------------------------------------

static void multiply_chunk(Engine *e, int chunk, int thread) {
    (void)thread;
    const Matrix m = *e->matrix;
    int n = m.n_columns, n_rows = e->n_rows, adds = e->adds_to_out;
    int n_parts = e->matrix == &e->head ? 1 : 2;  // of each row of e->rounded
    size_t stride = n_parts == 1 ? 2 * (size_t)e->widest : (size_t)e->widest;
    const int16_t *rounded = e->rounded;
    const float *rounded_scale = e->rounded_scale;
    float *out = e->out, left_unit = 1 / largest_rounded(n);
    int32_t sums[2 * MAX_ROWS];
    int first = chunk * e->chunk_size;
    int last = first + e->chunk_size < m.n_rows ? first + e->chunk_size : m.n_rows;
    for (int i = first; i < last; i++) {
        const int8_t *weights = m.weights + (size_t)i * n;
        for (int j = 0; j < n; j += 64) __builtin_prefetch(weights + j + LOOK_AHEAD);
        dot_all(weights, rounded, n_parts * n_rows, stride, n, sums);
        for (int row = 0; row < n_rows; row++) {
            float y = sums[n_parts * row];
            if (n_parts == 2) y += sums[2 * row + 1] * left_unit;
            y *= m.scales[i] * rounded_scale[row];
            if (m.bias) y += m.bias[i];
            size_t at = (size_t)row * m.n_rows + i;
            out[at] = adds ? out[at] + y : y;
        }
    }
}

/* Sets out (n_rows, matrix->n_rows) to the products of the rounded rows with the matrix, plus its bias,
   or adds them to it. The head, the largest matrix, uses only the first part of each rounded row, as no
   further layer multiplies its errors. */
static void multiply(Engine *e, const Matrix *matrix, float *out, int adds_to_out) {
    size_t work = (size_t)matrix->n_rows * matrix->n_columns * e->n_rows;
    int n_chunks = work / CHUNK_WORK > 4 ? work / CHUNK_WORK : 4;
    e->matrix = matrix;
    e->out = out;
    e->adds_to_out = adds_to_out;
    e->chunk_size = (matrix->n_rows + n_chunks - 1) / n_chunks;
    in_parallel(e, multiply_chunk, (matrix->n_rows + e->chunk_size - 1) / e->chunk_size, work);
}


// the model -------------------------------------------------------------------

static void add_row(const Matrix *matrix, int row, float *x) {
    const int8_t *weights = matrix->weights + (size_t)row * matrix->n_columns;
    for (int i = 0; i < matrix->n_columns; i++) x[i] += weights[i] * matrix->scales[row];
}

/* Sets x to the embedding of a token at a position. */
static void embed(const Engine *e, int token, int position, float *x) {
    const Config *c = &e->config;
    for (int i = 0; i < c->n_embd; i++) x[i] = 0;
    add_row(&e->embedding, token, x);
    if (c->position == LEARNED) add_row(&e->position, position, x);
    if (c->position == SINUSOIDAL) {
        const float *table = e->position_table + (size_t)position * c->n_embd;
        float scale = __builtin_sqrtf(c->n_embd);
        for (int i = 0; i < c->n_embd; i++) x[i] = x[i] * scale + table[i];
    }
}

static void normalize_and_round(Engine *e, int row, int thread) {
    int n = e->config.n_embd;
    float *normed = e->normed + (size_t)thread * n;
    normalize(&e->config, e->task_norm, e->x + (size_t)row * n, normed, n);
    round_row(e, row, normed, n);
}

static void apply_rope(float *x, const float *cos, const float *sin, int half) {
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

/* Returns where the keys or values of one head of a sequence begin in a cache. */
static float *in_cache(const Engine *e, float *cache, int sequence, int kv_head) {
    const Config *c = &e->config;
    size_t index = ((size_t)e->layer * e->n_sequences + sequence) * c->n_kv_head + kv_head;
    return cache + index * c->block_size * e->head_dim;
}

/* Normalizes and rotates the queries and keys of a row, and stores its keys and values in the cache. */
static void place_heads(Engine *e, int row, int thread) {
    (void)thread;
    const Config *c = &e->config;
    const Layer *layer = &e->layers[e->layer];
    int n = e->head_dim, position = e->position_of[row], sequence = e->sequence_of[row];
    float *queries = e->qkv + (size_t)row * qkv_width(c);
    float *keys = queries + c->n_head * n, *values = keys + c->n_kv_head * n;
    for (int head = 0; head < c->n_head + c->n_kv_head; head++) {  // the keys follow the queries
        float *x = queries + head * n;
        if (c->qk_norm) normalize(c, head < c->n_head ? &layer->q_norm : &layer->k_norm, x, x, n);
        if (c->position == ROPE) {
            const float *cos = e->position_table + (size_t)position * n;
            apply_rope(x, cos, cos + n / 2, n / 2);
        }
    }
    for (int head = 0; head < c->n_kv_head; head++) {
        float *key = in_cache(e, e->keys, sequence, head) + (size_t)position * n;
        float *value = in_cache(e, e->values, sequence, head) + (size_t)position * n;
        for (int i = 0; i < n; i++) key[i] = keys[head * n + i];
        for (int i = 0; i < n; i++) value[i] = values[head * n + i];
    }
}

/* Computes the attention of one head of one row. index: row * n_head + head. */
static void attend(Engine *e, int index, int thread) {
    const Config *c = &e->config;
    int row = index / c->n_head, head = index % c->n_head, n = e->head_dim;
    int kv_head = head / (c->n_head / c->n_kv_head);
    int length = e->position_of[row] + 1;
    const float *query = e->qkv + (size_t)row * qkv_width(c) + head * n;
    const float *keys = in_cache(e, e->keys, e->sequence_of[row], kv_head);
    const float *values = in_cache(e, e->values, e->sequence_of[row], kv_head);
    float *scores = e->scores + (size_t)thread * c->block_size;
    float *out = e->attended + (size_t)row * c->n_embd + head * n;

    float highest = -__builtin_inff();
    for (int t = 0; t < length; t++) {
        scores[t] = dot_floats(query, keys + (size_t)t * n, n);
        if (scores[t] > highest) highest = scores[t];
    }
    float sum = exponentials(scores, scores, length, highest, 1 / __builtin_sqrtf(n));
    for (int i = 0; i < n; i++) out[i] = 0;
    for (int t = 0; t < length; t++) {
        float share = scores[t] / sum;
        for (int i = 0; i < n; i++) out[i] += share * values[(size_t)t * n + i];
    }
}

static void round_attended(Engine *e, int row, int thread) {
    (void)thread;
    round_row(e, row, e->attended + (size_t)row * e->config.n_embd, e->config.n_embd);
}

/* Applies the activation to a row of hidden, in place. swiglu: the gates are before what they multiply. */
static void activate_and_round(Engine *e, int row, int thread) {
    (void)thread;
    const Config *c = &e->config;
    int n = c->mlp_width;
    float *x = e->hidden + (size_t)row * up_width(c);
    switch (c->mlp) {
    case SWIGLU:
        for (int i = 0; i < n; i++) x[i] = x[i] / (1 + exponential(-x[i])) * x[n + i];
        break;
    case GELU:  // x / 2 * (1 + tanh(z)) = x / (1 + exp(-2 z)), z = sqrt(2 / pi) * (x + 0.044715 x^3)
        for (int i = 0; i < n; i++)
            x[i] = x[i] / (1 + exponential(-1.5957691216057308f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
        break;
    default:
        for (int i = 0; i < n; i++) x[i] = x[i] > 0 ? x[i] : 0;
        if (c->mlp == RELU2)
            for (int i = 0; i < n; i++) x[i] *= x[i];
    }
    round_row(e, row, x, n);
}

static void normalize_rows(Engine *e, const Norm *norm) {
    e->task_norm = norm;
    in_parallel(e, normalize_and_round, e->n_rows, (size_t)4 * e->n_rows * e->config.n_embd);
}

/* Reads the rows through one block. */
static void run_layer(Engine *e, int index) {
    const Config *c = &e->config;
    const Layer *layer = &e->layers[index];
    size_t n_rows = e->n_rows;
    e->layer = index;

    normalize_rows(e, &layer->attn_norm);
    multiply(e, &layer->qkv, e->qkv, SET);
    in_parallel(e, place_heads, n_rows, 4 * n_rows * c->n_embd);
    size_t longest = e->position_of[n_rows - 1] + 1;
    in_parallel(e, attend, n_rows * c->n_head, 2 * n_rows * c->n_embd * longest);
    in_parallel(e, round_attended, n_rows, 4 * n_rows * c->n_embd);
    multiply(e, &layer->proj, e->x, ADD);

    normalize_rows(e, &layer->mlp_norm);
    multiply(e, &layer->up, e->hidden, SET);
    in_parallel(e, activate_and_round, n_rows, 8 * n_rows * c->mlp_width);
    multiply(e, &layer->down, e->x, ADD);
}

/* Keeps only the last token of each sequence among the rows. */
static void keep_last_tokens(Engine *e, int last_position) {
    int n = e->config.n_embd, n_kept = 0;
    for (int row = 0; row < e->n_rows; row++) {
        if (e->position_of[row] != last_position) continue;
        for (int i = 0; i < n; i++) e->x[(size_t)n_kept * n + i] = e->x[(size_t)row * n + i];
        n_kept++;
    }
    e->n_rows = n_kept;
}

/* Reads n_tokens of each of n_sequences sequences; the first of them is at position `start`.

   tokens: (n_sequences, n_tokens). Sets logits (n_sequences, vocab_size) to those of the token that follows.
   Keys and values of the positions before `start` come from earlier calls. Tokens must be below vocab_size,
   and start + n_tokens at most block_size. */
void forward(Engine *e, const int32_t *tokens, int n_sequences, int n_tokens, int start, float *logits) {
    const Config *c = &e->config;
    int n_all = n_sequences * n_tokens;
    wake_threads(e);
    for (int first = 0; first < n_all; first += MAX_ROWS) {
        e->n_rows = n_all - first < MAX_ROWS ? n_all - first : MAX_ROWS;
        for (int row = 0; row < e->n_rows; row++) {
            e->sequence_of[row] = (first + row) / n_tokens;
            e->position_of[row] = start + (first + row) % n_tokens;
            embed(e, tokens[first + row], e->position_of[row], e->x + (size_t)row * c->n_embd);
        }
        for (int layer = 0; layer < c->n_layer; layer++) run_layer(e, layer);
        keep_last_tokens(e, start + n_tokens - 1);
        if (e->n_rows == 0) continue;
        normalize_rows(e, &e->norm);
        multiply(e, &e->head, logits, SET);
        logits += (size_t)e->n_rows * c->vocab_size;
    }
    rest_threads(e);
}

/* Makes an engine in `memory`, which has engine_size(...) bytes. weights: as core/native.py packs them; they
   stay where they are. Both are at multiples of 64. The caller fills `position_table`. */
Engine *engine_open(void *memory, const Config *config, const void *weights, int n_sequences, int n_threads) {
    Arena arena = {(uintptr_t)memory, 0};
    Arena weight_arena = {(uintptr_t)weights, 0};
    Engine *e = take(&arena, 1, sizeof(Engine));
    *e = make_engine(config, n_sequences, n_threads);
    e->layers = take(&arena, config->n_layer, sizeof(Layer));
    take_weights(&weight_arena, e);
    take_buffers(&arena, e);
    start_threads(e);
    return e;
}

float *position_table(Engine *e) { return e->position_table; }
