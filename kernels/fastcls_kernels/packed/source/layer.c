#include <omp.h>

#include "layer.h"

/* Threads share a batch in one of two ways:

   apart     each takes sequences of its own through all layers, and nobody waits before the end;
   together  where there are too few sequences for that: each takes some rows of all, and in each layer all wait once,
             until keys and values of all rows are there.

   To share each operation instead means seven waits a layer, each as long as the slowest core is late. */

#if HAS_BFLOAT16
static void attend_bfloat16(const layer_t *layer, const float *query, ptrdiff_t query_stride, int num_queries, const float *keys,
                            const float *values, ptrdiff_t stride, int length, int head, float *out, ptrdiff_t out_stride, float *scratch);
#define ATTEND(KIND) ((KIND) == BFLOAT16 ? attend_bfloat16 : attend)
#else
#define ATTEND(KIND) attend
#endif

/* Tokens that a thread takes at once, in whole sequences: about as many as its cache holds. */
#define TOKENS 128

static void add_norm_row(const float *x, int width, const float *weight, const float *bias, float eps, float *out) {
  vec total = zero();
  for (int i = 0; i < width; i += LANES) total = add(total, load(x + i));
  const vec mean = vec_of(sum_of(total) / (float)width);
  vec squares = zero();
  for (int i = 0; i < width; i += LANES) {
    const vec centred = subtract(load(x + i), mean);
    squares = times_plus(centred, centred, squares);
  }
  const vec factor = vec_of(1.0f / sqrtf(sum_of(squares) / (float)width + eps));
  for (int i = 0; i < width; i += LANES) {
    const vec normed = times(subtract(load(x + i), mean), factor);
    store(out + i, times_plus(normed, load(weight + i), bias ? load(bias + i) : zero()));
  }
}

/* A thread's memory, for as many rows as it takes at once. */
typedef struct {
  float *context, *attended, *inner; /* [rows][width], [rows][width], [rows][inner] */
  rows_t x, middle;
  float *scratch;                    /* of the attention */
  int rows;
} memory_t;

/* Adds `size` bytes, in whole lines of the cache. */
static void *take(char **from, size_t size) {
  void *here = *from;
  *from += (size + 63) / 64 * 64;
  return here;
}

static rows_t take_rows(enum kind kind, char **from, int rows, int width) {
  rows_t made = {NULL, width, NULL, NULL, width, groups_of(width)};
  if (kind != FLOAT32) made.values = take(from, (size_t)rows * width * (kind == INT8 ? 1 : 2));
  if (kind == INT8) {
    made.scales = take(from, sizeof(float) * rows * made.groups);
    made.zero_points = take(from, sizeof(int32_t) * rows * made.groups);
  }
  return made;
}

/* Lays a thread's memory out, and returns where it ends. */
static char *lay_out(const layer_t *layer, int rows, int longest, char *from, memory_t *memory) {
  memory->rows = rows;
  memory->context = take(&from, sizeof(float) * rows * layer->width);
  memory->attended = take(&from, sizeof(float) * rows * layer->width);
  memory->inner = layer->up.kind == FLOAT32 ? take(&from, sizeof(float) * rows * layer->inner) : NULL;
  memory->x = take_rows(layer->qkv.kind, &from, rows, layer->width);
  memory->middle = take_rows(layer->down.kind, &from, rows, layer->inner);
  memory->scratch = take(&from, sizeof(float) * scratch_of(layer, longest));
  return from;
}

/* How a batch is shared, and the memory that it needs. */
typedef struct {
  int apart;
  int tokens; /* that a chunk's sequences begin within; together, there is one chunk */
  int chunks;
  int rows;   /* of a thread's memory */
  int most;   /* tokens that a chunk may have: its last sequence may end behind the others */
  size_t own; /* bytes of a thread's memory */
  size_t qkv; /* bytes of a chunk's queries, keys and values */
} plan_t;

/* Whether threads take sequences of their own: where the longest one does not keep one thread at work for much longer than
   the others. */
EXPORT int32_t FORM(fastcls_are_apart)(int tokens, int longest, int threads) {
  return threads == 1 || (int64_t)longest * threads <= (int64_t)tokens + tokens / 8;
}

static plan_t plan_of(const layer_t *layer, int tokens, int longest, int threads) {
  plan_t plan = {.apart = FORM(fastcls_are_apart)(tokens, longest, threads)};
  plan.chunks = plan.apart ? (tokens + TOKENS - 1) / TOKENS : 1;
  /* As many chunks for each thread. */
  if (plan.apart) plan.chunks += (threads - plan.chunks % threads) % threads;
  plan.tokens = plan.chunks ? (tokens + plan.chunks - 1) / plan.chunks : 1;
  plan.most = plan.apart ? least(plan.tokens + longest, tokens) : tokens;
  plan.rows = plan.apart ? plan.most : least(tokens, TOKENS);
  memory_t memory;
  plan.own = (size_t)(lay_out(layer, plan.rows, longest, NULL, &memory) - (char *)NULL);
  char *end = NULL;
  take(&end, sizeof(float) * plan.most * 3 * layer->width);
  plan.qkv = (size_t)(end - (char *)NULL);
  return plan;
}

static void multiply(const weight_t *weight, const float *x, rows_t *rows, int count, result_t result) {
  read_rows(weight->kind, x, weight->in_features, count, rows, 1);
  product(weight, rows, count, &result, 1);
}

/* Behind the attention: `x` is the residual and takes the result. */
static void finish_rows(const layer_t *layer, float *x, int rows, memory_t *memory) {
  const int width = layer->width;
  multiply(&layer->out, memory->context, &memory->x, rows, (result_t){NONE, x, width, memory->attended, width, NULL});
  for (float *row = memory->attended; row < memory->attended + (ptrdiff_t)rows * width; row += width)
    add_norm_row(row, width, layer->attention_norm, layer->attention_norm_bias, layer->eps, row);
  const int function = layer->function;
  multiply(&layer->up, memory->attended, &memory->x, rows,
           (result_t){function, NULL, 0, memory->inner, layer->inner, memory->inner ? NULL : &memory->middle});
  if (memory->inner) read_rows(FLOAT32, memory->inner, layer->inner, rows, &memory->middle, 1);
  const result_t result = {NONE, memory->attended, width, x, width, NULL};
  product(&layer->down, &memory->middle, rows, &result, 1);
  for (float *row = x; row < x + (ptrdiff_t)rows * width; row += width)
    add_norm_row(row, width, layer->output_norm, layer->output_norm_bias, layer->eps, row);
}

/* Queries, keys and values of rows from `begin` to `end` of a chunk: `x` and `qkv` begin with its first one. */
static void project(const layer_t *layer, const float *x, int begin, int end, float *qkv, memory_t *memory) {
  const int width = layer->width;
  for (int row = begin; row < end; row += memory->rows)
    multiply(&layer->qkv, x + (ptrdiff_t)row * width, &memory->x, least(memory->rows, end - row),
             (result_t){NONE, NULL, 0, qkv + (ptrdiff_t)row * 3 * width, 3 * width, NULL});
}

/* The rest of the layer for rows from `begin` to `end` of a chunk, at most as many as the thread's memory holds. */
static void attend_rows(const layer_t *layer, float *x, const int32_t *starts, int sequences, int begin, int end, const float *qkv, memory_t *memory) {
  const int width = layer->width;
  for (int i = 0; i < sequences; i++) {
    const int start = starts[i] - starts[0], stop = starts[i + 1] - starts[0];
    const int first = start > begin ? start : begin, last = least(stop, end);
    if (first >= last) continue;
    const float *keys = qkv + (ptrdiff_t)start * 3 * width + width, *queries = qkv + (ptrdiff_t)first * 3 * width;
    for (int head = 0; head < layer->num_heads; head++)
      ATTEND(layer->qkv.kind)(layer, queries, 3 * width, last - first, keys, keys + width, 3 * width, stop - start, head,
                              memory->context + (ptrdiff_t)(first - begin) * width, width, memory->scratch);
  }
  finish_rows(layer, x + (ptrdiff_t)begin * width, end - begin, memory);
}

/* Some columns of a weight, from a multiple of 64 on. */
static weight_t columns_of(const weight_t *weight, int first, int count) {
  weight_t part = *weight;
  const ptrdiff_t size = weight->kind == INT8 ? 1 : weight->kind == BFLOAT16 ? 2 : 4;
  part.out_features = count;
  part.packed = (const char *)weight->packed + first * weight->in_features * size;
  part.bias += first;
  if (weight->kind == INT8) part.scales += first, part.sums += first;
  return part;
}

/* Keys and values alone, for `attend_first_rows`. */
static void project_keys(const layer_t *layer, const float *x, int begin, int end, float *kv, memory_t *memory) {
  const int width = layer->width;
  const weight_t of_rest = columns_of(&layer->qkv, width, 2 * width);
  for (int row = begin; row < end; row += memory->rows)
    multiply(&of_rest, x + (ptrdiff_t)row * width, &memory->x, least(memory->rows, end - row),
             (result_t){NONE, NULL, 0, kv + (ptrdiff_t)row * 2 * width, 2 * width, NULL});
}

/* The rest of the layer for the first row of each of some sequences: `x` and `kv` begin with row `origin`. */
static void attend_first_rows(const layer_t *layer, const float *x, const int32_t *starts, int sequences, int origin, const float *kv, memory_t *memory, float *out) {
  const int width = layer->width;
  const weight_t of_query = columns_of(&layer->qkv, 0, width);
  /* Where sequences are empty there may be more of them than rows. */
  for (int done = 0; done < sequences; done += memory->rows) {
    const int count = least(memory->rows, sequences - done);
    float *to = out + (ptrdiff_t)done * width;
    for (int i = 0; i < count; i++) {
      const int32_t *start = starts + done + i;
      /* An empty sequence has no first row. */
      if (start[1] > start[0])
        memcpy(to + (ptrdiff_t)i * width, x + (ptrdiff_t)(start[0] - origin) * width, sizeof(float) * width);
      else
        memset(to + (ptrdiff_t)i * width, 0, sizeof(float) * width);
    }
    multiply(&of_query, to, &memory->x, count, (result_t){NONE, NULL, 0, memory->attended, width, NULL});
    for (int i = 0; i < count; i++) {
      const int start = starts[done + i], length = starts[done + i + 1] - start;
      const float *keys = kv + (ptrdiff_t)(start - origin) * 2 * width;
      for (int head = 0; head < layer->num_heads; head++)
        attend_first(layer, memory->attended + (ptrdiff_t)i * width, keys, keys + width, 2 * width, length, head,
                     memory->context + (ptrdiff_t)i * width, memory->scratch);
    }
    finish_rows(layer, to, count, memory);
  }
}

/* The first sequence that begins at a token or behind it. */
static int first_from(const int32_t *starts, int sequences, int token) {
  int low = 0, high = sequences;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (starts[middle] - starts[0] < token) low = middle + 1; else high = middle;
  }
  return low;
}

/* A thread's part of a chunk: all of it, or together with others some of its rows. `first_rows` takes those of the last
   layer, where they alone are wanted. */
static void chunk_of(const layer_t *layer, float *x, const int32_t *starts, int sequences, int part, int parts, float *qkv, memory_t *memory, float *first_rows) {
  const int tokens = starts[sequences] - starts[0];
  /* Whole blocks of rows. */
  const int share = ((tokens + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
  const int begin = least(part * share, tokens), end = least(begin + share, tokens);
  x += (ptrdiff_t)starts[0] * layer->width;
  (first_rows ? project_keys : project)(layer, x, begin, end, qkv, memory);
  if (parts > 1) {
#pragma omp barrier
  }
  if (first_rows) {
    const int each = (sequences + parts - 1) / parts, first = least(part * each, sequences), last = least(first + each, sequences);
    attend_first_rows(layer, x, starts + first, last - first, starts[0], qkv, memory, first_rows + (ptrdiff_t)first * layer->width);
  } else
    for (int row = begin; row < end; row += memory->rows)
      attend_rows(layer, x, starts, sequences, row, least(row + memory->rows, end), qkv, memory);
}

EXPORT size_t FORM(fastcls_layers_memory)(const layer_t *layer, int tokens, int longest, int threads) {
  const plan_t plan = plan_of(layer, tokens, longest, threads);
  return 64 + plan.own * threads + plan.qkv * (plan.apart ? threads : 2);
}

/* Layers of one shape. x: [tokens][width], in place where `first_rows` is NULL; else [sequences][width] of the last layer
   go there, and x means nothing. */
EXPORT void FORM(fastcls_layers)(const layer_t *const *layers, int count, float *x, const int32_t *starts, int sequences, int longest,
                           float *first_rows, char *space, int threads) {
  const int tokens = starts[sequences] - starts[0], width = layers[0]->width;
  const plan_t plan = plan_of(layers[0], tokens, longest, threads);
  space = (char *)(((uintptr_t)space + 63) / 64 * 64);
#pragma omp parallel if (threads > 1) num_threads(threads)
  {
    const int thread = omp_get_thread_num(), there = omp_get_num_threads();
    const int part = plan.apart ? 0 : thread, parts = plan.apart ? 1 : there;
    /* Neighbouring chunks for each thread. */
    const int each = (plan.chunks + there - 1) / there;
    const int from = plan.apart ? thread * each : 0, to = plan.apart ? least(from + each, plan.chunks) : 1;
    memory_t memory;
    lay_out(layers[0], plan.rows, longest, space + plan.own * thread, &memory);
    for (int index = 0; index < count; index++) {
      /* Together, two take turns: the next layer's are written while others read this one's. */
      const size_t place = plan.apart ? (size_t)thread : (size_t)(index % 2);
      float *qkv = (float *)(space + plan.own * threads + plan.qkv * place);
      for (int chunk = from; chunk < to && tokens; chunk++) {
        const int begin = first_from(starts, sequences, chunk * plan.tokens);
        const int end = chunk + 1 < plan.chunks ? first_from(starts, sequences, (chunk + 1) * plan.tokens) : sequences;
        if (begin == end) continue;
        float *of_chunk = first_rows && index == count - 1 ? first_rows + (ptrdiff_t)begin * width : NULL;
        chunk_of(layers[index], x, starts + begin, end - begin, part, parts, qkv, &memory, of_chunk);
      }
    }
  }
}
