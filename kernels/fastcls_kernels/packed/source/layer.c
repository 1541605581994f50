#include "layer.h"

#include <omp.h>

void add_norm_row(const float *x, int width, const float *weight, const float *bias, float eps, float *out) {
  vec total = _mm512_setzero_ps();
  for (int i = 0; i < width; i += LANES) total = _mm512_add_ps(total, load(x + i));
  const vec mean = vec_of(_mm512_reduce_add_ps(total) / (float)width);
  vec squares = _mm512_setzero_ps();
  for (int i = 0; i < width; i += LANES) {
    const vec centred = _mm512_sub_ps(load(x + i), mean);
    squares = _mm512_fmadd_ps(centred, centred, squares);
  }
  const vec factor = vec_of(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + eps));
  for (int i = 0; i < width; i += LANES) {
    const vec normed = _mm512_mul_ps(_mm512_sub_ps(load(x + i), mean), factor);
    store(out + i, _mm512_fmadd_ps(normed, load(weight + i), bias ? load(bias + i) : _mm512_setzero_ps()));
  }
}

/* Memory of a thread, in 64-byte steps, for as many tokens as it takes at once. */
typedef struct {
  float *qkv, *context, *attended, *inner, *scratch;
  size_t scratch_size;
  int tokens;
  rows_t x, middle;
} memory_t;

static void *take(char **from, size_t size) {
  void *here = *from;
  *from += (size + 63) / 64 * 64;
  return here;
}

static rows_t take_rows(enum kind kind, char **from, int tokens, int width) {
  rows_t made = {NULL, width, NULL, NULL, width, groups_of(width)};
  if (kind != FLOAT32) made.values = take(from, (size_t)tokens * width * (kind == INT8 ? 1 : 2));
  if (kind == INT8) {
    made.scales = take(from, sizeof(float) * tokens * made.groups);
    made.zero_points = take(from, sizeof(int32_t) * tokens * made.groups);
  }
  return made;
}

static size_t lay_out(const layer_t *layer, int tokens, int longest, int threads, char *from, memory_t *memory) {
  char *at = from;
  const size_t panels = panels_of(longest);
  memory->tokens = tokens;
  memory->qkv = take(&at, sizeof(float) * tokens * 3 * layer->width);
  memory->context = take(&at, sizeof(float) * tokens * layer->width);
  memory->attended = take(&at, sizeof(float) * tokens * layer->width);
  memory->inner = layer->up.kind == FLOAT32 ? take(&at, sizeof(float) * tokens * layer->inner) : NULL;
  memory->x = take_rows(layer->qkv.kind, &at, tokens, layer->width);
  memory->middle = take_rows(layer->down.kind, &at, tokens, layer->inner);
  memory->scratch_size = panels * PANEL * (layer->head_dim + ROWS);
  memory->scratch = take(&at, threads * sizeof(float) * memory->scratch_size);
  return (size_t)(at - from);
}

static void multiply(const weight_t *weight, const float *x, rows_t *rows, int count, result_t result, int threads) {
  read_rows(weight->kind, x, weight->in_features, count, rows, threads);
  product(weight, rows, count, &result, threads);
}

/* Behind the attention, for rows in one piece: `x` is the residual and takes the result. */
static void finish_rows(const layer_t *layer, float *x, int rows, memory_t *memory, int threads) {
  const int width = layer->width;
  multiply(&layer->out, memory->context, &memory->x, rows, (result_t){NONE, x, width, memory->attended, width, NULL}, threads);
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
  for (int row = 0; row < rows; row++)
    add_norm_row(memory->attended + (ptrdiff_t)row * width, width, layer->attention_norm, layer->attention_norm_bias, layer->eps,
                 memory->attended + (ptrdiff_t)row * width);
  result_t raised = {layer->function, NULL, 0, memory->inner, layer->inner, memory->inner ? NULL : &memory->middle};
  multiply(&layer->up, memory->attended, &memory->x, rows, raised, threads);
  if (memory->inner) read_rows(FLOAT32, memory->inner, layer->inner, rows, &memory->middle, threads);
  const result_t lowered = {NONE, memory->attended, width, x, width, NULL};
  product(&layer->down, &memory->middle, rows, &lowered, threads);
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
  for (int row = 0; row < rows; row++)
    add_norm_row(x + (ptrdiff_t)row * width, width, layer->output_norm, layer->output_norm_bias, layer->eps, x + (ptrdiff_t)row * width);
}

/* All rows of some whole sequences. */
static void some(const layer_t *layer, float *x, const int32_t *starts, int sequences, memory_t *memory, int threads) {
  const int width = layer->width, first = starts[0], tokens = starts[sequences] - first;
  float *rows = x + (ptrdiff_t)first * width;
  multiply(&layer->qkv, rows, &memory->x, tokens, (result_t){NONE, NULL, 0, memory->qkv, 3 * width, NULL}, threads);
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
  for (int item = 0; item < sequences * layer->num_heads; item++) {
    const int sequence = item / layer->num_heads, head = item % layer->num_heads, start = starts[sequence] - first;
    const int length = starts[sequence + 1] - starts[sequence];
    const float *qkv = memory->qkv + (ptrdiff_t)start * 3 * width;
    int thread = threads > 1 ? omp_get_thread_num() : 0;
    attend(layer, qkv, 3 * width, length, qkv + width, qkv + 2 * width, 3 * width, length, head,
           memory->context + (ptrdiff_t)start * width, width, memory->scratch + thread * memory->scratch_size);
  }
  finish_rows(layer, rows, tokens, memory, threads);
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

/* The first rows of some sequences, behind their keys and values, which begin with those of token `origin`. */
static void first_rows_of(const layer_t *layer, const float *x, const int32_t *starts, int sequences, int origin, memory_t *memory, int threads, float *out) {
  const int width = layer->width;
  const weight_t of_query = columns_of(&layer->qkv, 0, width);
  for (int i = 0; i < sequences; i++) {
    float *to = out + (ptrdiff_t)i * width;
    /* An empty sequence has no first row. */
    if (starts[i + 1] > starts[i])
      memcpy(to, x + (ptrdiff_t)starts[i] * width, sizeof(float) * width);
    else
      memset(to, 0, sizeof(float) * width);
  }
  multiply(&of_query, out, &memory->x, sequences, (result_t){NONE, NULL, 0, memory->attended, width, NULL}, threads);
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
  for (int i = 0; i < sequences; i++) {
    const float *keys = memory->qkv + (ptrdiff_t)(starts[i] - origin) * 2 * width;
    float *scores = memory->scratch + (threads > 1 ? omp_get_thread_num() : 0) * memory->scratch_size;
    for (int head = 0; head < layer->num_heads; head++)
      attend_first(layer, memory->attended + (ptrdiff_t)i * width, keys, keys + width, 2 * width, starts[i + 1] - starts[i], head,
                   memory->context + (ptrdiff_t)i * width, scores);
  }
  finish_rows(layer, out, sequences, memory, threads);
}

/* The first row of each of some whole sequences: keys and values of all rows, the rest for the first ones alone. */
static void some_first(const layer_t *layer, const float *x, const int32_t *starts, int sequences, memory_t *memory, int threads, float *out) {
  const int width = layer->width, first = starts[0], tokens = starts[sequences] - first;
  const weight_t of_rest = columns_of(&layer->qkv, width, 2 * width);
  multiply(&of_rest, x + (ptrdiff_t)first * width, &memory->x, tokens, (result_t){NONE, NULL, 0, memory->qkv, 2 * width, NULL}, threads);
  /* Where sequences are empty there may be more of them than tokens. */
  for (int i = 0; i < sequences; i += memory->tokens)
    first_rows_of(layer, x, starts + i, least(memory->tokens, sequences - i), first, memory, threads, out + (ptrdiff_t)i * width);
}

/* Tokens that a thread takes at once, in whole sequences: about as many as its cache holds. */
#define TOKENS 128

typedef struct {
  int apart;   /* each thread takes sequences of its own, so that none waits; else all share each operation */
  int tokens;  /* a chunk's sequences begin within so many tokens */
} plan_t;

static plan_t plan_of(int tokens, int longest, int threads) {
  plan_t plan;
  plan.apart = threads > 1 && longest * threads <= tokens + tokens / 8;
  /* As many chunks for each thread. */
  int chunks = (tokens + TOKENS - 1) / TOKENS;
  if (plan.apart) chunks += (threads - chunks % threads) % threads;
  plan.tokens = chunks ? (tokens + chunks - 1) / chunks : 1;
  return plan;
}

/* The most tokens that a chunk may have: its last sequence may end behind it. */
static int most_of(plan_t plan, int tokens, int longest) { return least(plan.tokens + longest, tokens); }

EXPORT size_t fastcls_layer_memory(const layer_t *layer, int tokens, int longest, int threads) {
  memory_t memory;
  const plan_t plan = plan_of(tokens, longest, threads);
  const size_t size = lay_out(layer, most_of(plan, tokens, longest), longest, plan.apart ? 1 : threads, NULL, &memory) + 64;
  return size * (plan.apart ? threads : 1);
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

/* x: [tokens][width], in place where `first_rows` is NULL; else [sequences][width] go there. */
EXPORT void fastcls_layer(const layer_t *layer, float *x, const int32_t *starts, int sequences, int longest, float *first_rows, char *space, int threads) {
  const int tokens = starts[sequences] - starts[0];
  const plan_t plan = plan_of(tokens, longest, threads);
  const int inside = plan.apart ? 1 : threads, most = most_of(plan, tokens, longest);
  const int chunks = (tokens + plan.tokens - 1) / plan.tokens;
#pragma omp parallel for if (plan.apart) num_threads(threads) schedule(dynamic)
  for (int i = 0; i < chunks; i++) {
    const int begin = first_from(starts, sequences, i * plan.tokens);
    const int end = i + 1 < chunks ? first_from(starts, sequences, (i + 1) * plan.tokens) : sequences;
    if (begin == end) continue;
    memory_t memory;
    char *from = (char *)(((uintptr_t)space + 63) / 64 * 64);
    const size_t size = lay_out(layer, most, longest, inside, from, &memory);
    if (plan.apart) lay_out(layer, most, longest, inside, from + size * omp_get_thread_num(), &memory);
    if (first_rows)
      some_first(layer, x, starts + begin, end - begin, &memory, inside, first_rows + (ptrdiff_t)begin * layer->width);
    else
      some(layer, x, starts + begin, end - begin, &memory, inside);
  }
}
