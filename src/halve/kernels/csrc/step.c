/* One decode step of a whole model: from token ids to logits in one call, one team of threads.

   Activations are float32 throughout; keys and values are stored in the model's dtype. What a layer is made of comes
   from halve/decode/cpu_step.py; the structures here and in halve/kernels/structures.py have to agree, which is checked
   when the library is loaded (`halve_step_declarations`). */

#include "cpu.h"
#include "threads.h"

#include <math.h>
#include <string.h>

/* Linear: y = scatter(W gather(x)) + bias */
typedef struct {
    const weight_t *weight;      /* NULL: absent */
    const void *bias;            /* [outputs] in the model's kind, or NULL */
    const int64_t *input_index;  /* [weight->in_features] or NULL: all */
    const int64_t *output_index; /* [weight->rows] or NULL: all */
    int64_t outputs;
} linear_t;

typedef struct {
    const void *weight, *bias; /* in `kind`, or NULL */
    int64_t kind;
} norm_t;

typedef struct {
    norm_t attention_norm, mlp_norm, query_norm, key_norm;
    norm_t attention_output_norm, mlp_output_norm; /* of what is added to the stream */
    const float *cosine, *sine;                    /* [capacity][turned], or NULL */
    linear_t qkv[3], o, up[2], down; /* qkv, up: merged siblings are the first alone; up: gate, then up */
    int64_t heads, kv_heads;         /* 0: no attention */
    int64_t width;                   /* 0: no MLP */
    int64_t window;                  /* a query sees this many slots at most, 0: all */
    const float *growth;             /* [capacity], what queries are multiplied by, or NULL */
    int64_t turned;                  /* channels of a head that rotary embedding turns, the first */
} layer_t;

typedef struct {
    const kernels_t *kernels;
    const layer_t *layers;
    const weight_t *table; /* of the embedding */
    const void *positions; /* learned ones [..][hidden], or NULL */
    norm_t final_norm;
    linear_t head;
    int64_t layer_count, hidden, head_size, position_offset;
    int64_t bytes; /* read by a step */
    float eps, embed_scale, attention_scale, residual_scale, logit_divisor;
    float attention_cap, logit_cap; /* 0: none */
    int32_t kind;  /* FLOAT32 or BFLOAT16: positions, norms, biases, cache */
    int32_t rms, has_final_norm, norm_input, norm_output, qk_norm, qk_norm_whole, gated, activation;
    int32_t inner, outer, columns, segments; /* largest over all linears: inputs, outputs side by side, and stored */
} model_t;

typedef struct {
    void *const *keys, *const *values; /* per layer [batch][kv_heads][capacity][head_size] */
    int64_t batch, capacity;
} cache_t;

enum { SIDE_BY_SIDE = 3 }; /* linears that read one input */
enum { ACTIVATED = 512 };  /* hidden numbers a thread takes at a time */

typedef struct {
    const model_t *model;
    const cache_t *cache;
    const int64_t *tokens, *slots; /* [batch]: the ids, and the slot each is stored in */
    float *x;                      /* [batch][hidden]: the residual stream */
    float *in;                     /* [batch][inner]: what the next linears read */
    float *gathered;               /* [batch][inner] */
    float *out;                    /* [batch][outer]: what they write */
    rows_t rows[SIDE_BY_SIDE];     /* their input, prepared */
    /* of the current loop */
    const layer_t *layer;
    int64_t index;
    const linear_t *linears;
    int64_t number;
    const norm_t *norm;
    float *target;
    int64_t stride;
    int add;
} step_t;

/* ---- linears: rows of the input are prepared, then blocks of all of them are multiplied ---- */

/* outputs whose row is gone are the bias alone: written here, the products go on top */
static void fill(const step_t *s, const linear_t *linear, float *target) {
    for (int64_t o = 0; o < linear->outputs; ++o) {
        const float bias = linear->bias ? number_at(linear->bias, s->model->kind, o) : 0;
        target[o] = s->add ? target[o] + bias : bias;
    }
}

static void prepare_rows(void *data, int64_t first, int64_t last) {
    step_t *s = data;
    const model_t *model = s->model;
    for (int64_t m = first; m < last; ++m) {
        float *in = s->in + m * model->inner;
        if (s->norm)
            model->kernels->norm(s->x + m * model->hidden, model->hidden, s->norm->weight, s->norm->bias,
                                 (int)s->norm->kind, model->rms, model->eps, in);
        int64_t offset = 0;
        for (int64_t i = 0; i < s->number; ++i) {
            const linear_t *linear = s->linears + i;
            const weight_t *w = linear->weight;
            const float *source = in;
            if (linear->input_index) {
                float *gathered = s->gathered + m * model->inner;
                for (int64_t c = 0; c < w->in_features; ++c) gathered[c] = in[linear->input_index[c]];
                source = gathered;
            }
            w->kernels->prepare(w, source, FLOAT32, s->rows + i, m);
            if (linear->output_index) fill(s, linear, s->target + m * s->stride + offset);
            offset += linear->outputs;
        }
    }
}

static int64_t blocks_of(const linear_t *linear) { return (linear->weight->rows + ROWS - 1) / ROWS; }

static void multiply_blocks(void *data, int64_t first, int64_t last) {
    const step_t *s = data;
    const linear_t *linear = s->linears;
    const rows_t *rows = s->rows;
    float *target = s->target;
    int64_t before = 0; /* blocks of the linears before this one */
    for (int64_t item = first; item < last; ++item) {
        while (item - before >= blocks_of(linear)) {
            before += blocks_of(linear);
            target += linear->outputs;
            ++linear, ++rows;
        }
        const weight_t *w = linear->weight;
        const int64_t row = (item - before) * ROWS, size = w->rows - row < ROWS ? w->rows - row : ROWS;
        float y[MAX_COUNT * ROWS];
        w->kernels->multiply(w, rows, item - before, y);
        for (int64_t m = 0; m < rows->count; ++m) {
            float *place = target + m * s->stride, *values = y + m * ROWS;
            if (linear->output_index) {
                for (int64_t r = 0; r < size; ++r) place[linear->output_index[row + r]] += values[r];
                continue;
            }
            for (int64_t r = 0; linear->bias && r < size; ++r)
                values[r] += number_at(linear->bias, s->model->kind, row + r);
            for (int64_t r = 0; s->add && r < size; ++r) values[r] += place[row + r];
            memcpy(place + row, values, (size_t)size * sizeof(float));
        }
    }
}

/* target [batch][stride] = or += the `most` or fewer linears side by side of norm(x), or of `in` where norm is NULL */
static void run_linears(member_t *member, step_t *s, const norm_t *norm, const linear_t *linears, int most,
                        float *target, int64_t stride, int add) {
    int64_t blocks = 0;
    s->norm = norm, s->linears = linears, s->target = target, s->stride = stride, s->add = add;
    for (s->number = 0; s->number < most && linears[s->number].weight; ++s->number)
        blocks += blocks_of(linears + s->number);
    team_loop(member, s->cache->batch, prepare_rows, s);
    team_loop(member, blocks, multiply_blocks, s);
}

/* ---- what stands between the linears ---- */

static const void *cached(const void *buffer, const step_t *s, int64_t m, int64_t head, int64_t slot) {
    const model_t *model = s->model;
    const int64_t at = ((m * s->layer->kv_heads + head) * s->cache->capacity + slot) * model->head_size;
    return (const char *)buffer + at * (model->kind == BFLOAT16 ? 2 : 4);
}

static void store(const float *values, int64_t count, int kind, void *to) {
    if (kind == BFLOAT16)
        for (int64_t c = 0; c < count; ++c) ((uint16_t *)to)[c] = to_bf16(values[c]);
    else memcpy(to, values, (size_t)count * sizeof(float));
}

/* queries and keys, each over all heads */
static void norm_whole(void *data, int64_t first, int64_t last) {
    const step_t *s = data;
    const model_t *model = s->model;
    const layer_t *layer = s->layer;
    const norm_t *query = &layer->query_norm, *key = &layer->key_norm;
    const int64_t width = layer->heads * model->head_size;
    for (int64_t m = first; m < last; ++m) {
        float *out = s->out + m * model->outer, *keys = out + width;
        model->kernels->norm(out, width, query->weight, query->bias, (int)query->kind, 1, model->eps, out);
        model->kernels->norm(keys, layer->kv_heads * model->head_size, key->weight, key->bias, (int)key->kind, 1,
                             model->eps, keys);
    }
}

/* one key head of one prompt each: norms, rotary, the new key and value stored, its queries answered */
static void attend_heads(void *data, int64_t first, int64_t last) {
    const step_t *s = data;
    const model_t *model = s->model;
    const layer_t *layer = s->layer;
    const kernels_t *k = model->kernels;
    const int64_t size = model->head_size, shared = layer->heads / layer->kv_heads;
    for (int64_t item = first; item < last; ++item) {
        const int64_t m = item / layer->kv_heads, head = item % layer->kv_heads, slot = s->slots[m];
        float *queries = s->out + m * model->outer + head * shared * size;
        float *key = s->out + m * model->outer + (layer->heads + head) * size, *value = key + layer->kv_heads * size;
        for (int64_t h = 0; h <= shared; ++h) {
            float *vector = h < shared ? queries + h * size : key;
            const norm_t *norm = h < shared ? &layer->query_norm : &layer->key_norm;
            if (model->qk_norm && !model->qk_norm_whole)
                k->norm(vector, size, norm->weight, norm->bias, (int)norm->kind, 1, model->eps, vector);
            if (layer->cosine)
                k->rotate(vector, layer->cosine + slot * layer->turned, layer->sine + slot * layer->turned, layer->turned);
        }
        store(key, size, model->kind, (void *)cached(s->cache->keys[s->index], s, m, head, slot));
        store(value, size, model->kind, (void *)cached(s->cache->values[s->index], s, m, head, slot));
        const float scale = model->attention_scale * (layer->growth ? layer->growth[slot] : 1.0f);
        for (int64_t c = 0; c < shared * size; ++c) queries[c] *= scale;
        const int64_t oldest = layer->window && slot + 1 > layer->window ? slot + 1 - layer->window : 0;
        k->attend(queries, (int)shared, cached(s->cache->keys[s->index], s, m, head, 0),
                  cached(s->cache->values[s->index], s, m, head, 0), model->kind, oldest, slot + 1, size,
                  model->attention_cap, s->in + m * model->inner + head * shared * size);
    }
}

/* pieces of ACTIVATED numbers of one prompt each */
static void activate_pieces(void *data, int64_t first, int64_t last) {
    const step_t *s = data;
    const model_t *model = s->model;
    const int64_t width = s->layer->width, pieces = (width + ACTIVATED - 1) / ACTIVATED;
    for (int64_t item = first; item < last; ++item) {
        const int64_t m = item / pieces, at = item % pieces * ACTIVATED;
        const float *gate = s->out + m * model->outer + at;
        model->kernels->activate(gate, model->gated ? gate + width : NULL, width - at < ACTIVATED ? width - at : ACTIVATED,
                                 model->activation, s->in + m * model->inner + at);
    }
}

static void embed_rows(void *data, int64_t first, int64_t last) {
    const step_t *s = data;
    const model_t *model = s->model;
    for (int64_t m = first; m < last; ++m) {
        const int64_t place = (s->slots[m] + model->position_offset) * model->hidden;
        float *x = s->x + m * model->hidden;
        halve_cpu_row(model->table, s->tokens[m], x);
        for (int64_t c = 0; c < model->hidden; ++c) {
            x[c] *= model->embed_scale;
            if (model->positions) x[c] += number_at(model->positions, model->kind, place + c);
        }
    }
}

static void copy_rows(void *data, int64_t first, int64_t last) {
    const step_t *s = data;
    const int64_t hidden = s->model->hidden;
    for (int64_t m = first; m < last; ++m)
        memcpy(s->in + m * s->model->inner, s->x + m * hidden, (size_t)hidden * sizeof(float));
}

/* x += residual_scale * norm(out), or out as it is where norm is NULL */
static void add_rows(void *data, int64_t first, int64_t last) {
    const step_t *s = data;
    const model_t *model = s->model;
    for (int64_t m = first; m < last; ++m) {
        float *out = s->out + m * model->outer, *x = s->x + m * model->hidden;
        if (s->norm)
            model->kernels->norm(out, model->hidden, s->norm->weight, s->norm->bias, (int)s->norm->kind, model->rms,
                                 model->eps, out);
        for (int64_t c = 0; c < model->hidden; ++c) x[c] += model->residual_scale * out[c];
    }
}

/* out = the readers of the stream, behind `norm` where a model has such norms */
static void run_readers(member_t *member, step_t *s, const norm_t *norm, const linear_t *linears, int most) {
    if (!s->model->norm_input) team_loop(member, s->cache->batch, copy_rows, s);
    run_linears(member, s, s->model->norm_input ? norm : NULL, linears, most, s->out, s->model->outer, 0);
}

/* `linear` of `in` into the residual stream, behind `norm` where a model has such norms */
static void run_writer(member_t *member, step_t *s, const linear_t *linear, const norm_t *norm) {
    const model_t *model = s->model;
    if (!model->norm_output && model->residual_scale == 1) {
        run_linears(member, s, NULL, linear, 1, s->x, model->hidden, 1);
        return;
    }
    run_linears(member, s, NULL, linear, 1, s->out, model->outer, 0);
    s->norm = model->norm_output ? norm : NULL;
    team_loop(member, s->cache->batch, add_rows, s);
}

enum { FINISHED = 4096 }; /* logits a thread takes at a time */

static void finish_logits(void *data, int64_t first, int64_t last) {
    const step_t *s = data;
    const model_t *model = s->model;
    const int64_t all = s->cache->batch * model->head.outputs, end = last * FINISHED < all ? last * FINISHED : all;
    float *logits = s->target + first * FINISHED;
    const int64_t count = end - first * FINISHED;
    for (int64_t c = 0; c < count; ++c) logits[c] /= model->logit_divisor;
    if (model->logit_cap > 0) model->kernels->cap(logits, count, model->logit_cap);
}

/* ---- the step ---- */

typedef struct {
    const step_t *step;
    float *logits;
} call_t;

static void run_step(member_t *member, void *data) {
    const call_t *call = data;
    step_t step = *call->step, *s = &step; /* every thread fills in its own current loop */
    const model_t *model = s->model;
    const int64_t batch = s->cache->batch;
    team_loop(member, batch, embed_rows, s);
    for (s->index = 0; s->index < model->layer_count; ++s->index) {
        const layer_t *layer = s->layer = model->layers + s->index;
        if (layer->heads) {
            run_readers(member, s, &layer->attention_norm, layer->qkv, 3);
            if (model->qk_norm_whole) team_loop(member, batch, norm_whole, s);
            team_loop(member, batch * layer->kv_heads, attend_heads, s);
            run_writer(member, s, &layer->o, &layer->attention_output_norm);
        }
        if (layer->width) {
            run_readers(member, s, &layer->mlp_norm, layer->up, 2);
            team_loop(member, batch * ((layer->width + ACTIVATED - 1) / ACTIVATED), activate_pieces, s);
            run_writer(member, s, &layer->down, &layer->mlp_output_norm);
        }
    }
    if (!model->has_final_norm) team_loop(member, batch, copy_rows, s);
    run_linears(member, s, model->has_final_norm ? &model->final_norm : NULL, &model->head, 1, call->logits,
                model->head.outputs, 0);
    if (model->logit_cap > 0 || model->logit_divisor != 1)
        team_loop(member, (batch * model->head.outputs + FINISHED - 1) / FINISHED, finish_logits, s);
}

/* The buffers of a step from an address on; returns where they end. */
static uintptr_t lay_out(step_t *s, uintptr_t at) {
    const model_t *model = s->model;
    const int64_t batch = s->cache->batch;
    s->x = take(&at, batch * model->hidden * 4);
    s->in = take(&at, batch * model->inner * 4);
    s->gathered = take(&at, batch * model->inner * 4);
    s->out = take(&at, batch * model->outer * 4);
    for (int i = 0; i < SIDE_BY_SIDE; ++i) take_rows(&at, s->rows + i, batch, model->columns, model->segments);
    return at;
}

/* ---- called from cpu_step.py ---- */

/* Whether `number` linears side by side read `inputs` numbers, write `outputs`, and fit into the buffers. */
static int fits(const model_t *model, const linear_t *linears, int64_t number, int64_t inputs, int64_t outputs) {
    for (int64_t i = 0; i < number; ++i) {
        const linear_t *linear = linears + i;
        const weight_t *w = linear->weight;
        if (!w) return i > 0 && outputs == 0; /* merged siblings are the first alone */
        if (halve_cpu_check(w) || w->in_features > model->inner || w->columns > model->columns ||
            w->segments > model->segments)
            return 0;
        if (linear->input_index ? w->in_features > inputs : w->in_features != inputs) return 0;
        if (linear->output_index ? w->rows > linear->outputs : w->rows != linear->outputs) return 0;
        for (int64_t c = 0; linear->input_index && c < w->in_features; ++c)
            if (linear->input_index[c] < 0 || linear->input_index[c] >= inputs) return 0;
        for (int64_t r = 0; linear->output_index && r < w->rows; ++r)
            if (linear->output_index[r] < 0 || linear->output_index[r] >= linear->outputs) return 0;
        outputs -= linear->outputs;
    }
    return outputs == 0;
}

/* In a few words why a step cannot run, NULL where it can: sizes that contradict each other, or an index outside. */
const char *halve_step_check(const model_t *model, const cache_t *cache) {
    const int64_t size = model->head_size;
    if (cache->batch < 1 || cache->batch > MAX_COUNT || cache->capacity < 1) return "the cache has no slots, or too many rows";
    if (model->hidden < 1 || model->inner < model->hidden) return "the hidden size";
    if (model->kind != FLOAT32 && model->kind != BFLOAT16) return "numbers of another kind";
    for (int64_t index = 0; index < model->layer_count; ++index) {
        const layer_t *layer = model->layers + index;
        if (layer->heads) {
            if (size < 1) return "the head size";
            if (layer->cosine && (layer->turned % 2 || layer->turned < 0 || layer->turned > size)) return "the turned channels";
            if (layer->kv_heads < 1 || layer->heads % layer->kv_heads) return "heads that do not share keys evenly";
            if (!cache->keys[index] || !cache->values[index]) return "a layer without a cache";
            const int64_t outputs = (layer->heads + 2 * layer->kv_heads) * size;
            if (outputs > model->outer || layer->heads * size > model->inner ||
                !fits(model, layer->qkv, 3, model->hidden, outputs) ||
                !fits(model, &layer->o, 1, layer->heads * size, model->hidden))
                return "a linear of an attention";
        }
        if (layer->width) {
            const int64_t outputs = layer->width * (model->gated ? 2 : 1);
            if (outputs > model->outer || layer->width > model->inner ||
                !fits(model, layer->up, 2, model->hidden, outputs) ||
                !fits(model, &layer->down, 1, layer->width, model->hidden))
                return "a linear of an MLP";
        }
    }
    if (!fits(model, &model->head, 1, model->hidden, model->head.outputs)) return "the head";
    const weight_t *table = model->table;
    return table && !halve_cpu_check(table) && table->in_features == model->hidden ? NULL : "the embedding";
}

/* Bytes of scratch that a step needs, 64-byte aligned. */
int64_t halve_step_scratch(const model_t *model, const cache_t *cache) {
    step_t s = {.model = model, .cache = cache};
    return (int64_t)lay_out(&s, 0);
}

/* logits [batch][vocabulary] after `tokens`, whose keys and values go to `slots`. 0, or -1 where one of them is outside. */
int halve_step(const model_t *model, const cache_t *cache, const int64_t *tokens, const int64_t *slots, float *logits,
               void *scratch) {
    for (int64_t m = 0; m < cache->batch; ++m)
        if (tokens[m] < 0 || tokens[m] >= model->table->rows || slots[m] < 0 || slots[m] >= cache->capacity) return -1;
    step_t s = {.model = model, .cache = cache, .tokens = tokens, .slots = slots};
    lay_out(&s, (uintptr_t)scratch);
    call_t call = {&s, logits};
    run_team(model->bytes, run_step, &call);
    return 0;
}

const declaration_t *halve_step_declarations(void) {
    static const declaration_t table[] = {
        STRUCTURE(linear_t),
        FIELD(linear_t, weight),
        FIELD(linear_t, bias),
        FIELD(linear_t, input_index),
        FIELD(linear_t, output_index),
        FIELD(linear_t, outputs),
        STRUCTURE(norm_t),
        FIELD(norm_t, weight),
        FIELD(norm_t, bias),
        FIELD(norm_t, kind),
        STRUCTURE(layer_t),
        FIELD(layer_t, attention_norm),
        FIELD(layer_t, mlp_norm),
        FIELD(layer_t, query_norm),
        FIELD(layer_t, key_norm),
        FIELD(layer_t, attention_output_norm),
        FIELD(layer_t, mlp_output_norm),
        FIELD(layer_t, cosine),
        FIELD(layer_t, sine),
        FIELD(layer_t, qkv),
        FIELD(layer_t, o),
        FIELD(layer_t, up),
        FIELD(layer_t, down),
        FIELD(layer_t, heads),
        FIELD(layer_t, kv_heads),
        FIELD(layer_t, width),
        FIELD(layer_t, window),
        FIELD(layer_t, growth),
        FIELD(layer_t, turned),
        STRUCTURE(model_t),
        FIELD(model_t, kernels),
        FIELD(model_t, layers),
        FIELD(model_t, table),
        FIELD(model_t, positions),
        FIELD(model_t, final_norm),
        FIELD(model_t, head),
        FIELD(model_t, layer_count),
        FIELD(model_t, hidden),
        FIELD(model_t, head_size),
        FIELD(model_t, position_offset),
        FIELD(model_t, bytes),
        FIELD(model_t, eps),
        FIELD(model_t, embed_scale),
        FIELD(model_t, attention_scale),
        FIELD(model_t, residual_scale),
        FIELD(model_t, logit_divisor),
        FIELD(model_t, attention_cap),
        FIELD(model_t, logit_cap),
        FIELD(model_t, kind),
        FIELD(model_t, rms),
        FIELD(model_t, has_final_norm),
        FIELD(model_t, norm_input),
        FIELD(model_t, norm_output),
        FIELD(model_t, qk_norm),
        FIELD(model_t, qk_norm_whole),
        FIELD(model_t, gated),
        FIELD(model_t, activation),
        FIELD(model_t, inner),
        FIELD(model_t, outer),
        FIELD(model_t, columns),
        FIELD(model_t, segments),
        STRUCTURE(cache_t),
        FIELD(cache_t, keys),
        FIELD(cache_t, values),
        FIELD(cache_t, batch),
        FIELD(cache_t, capacity),
        FUNCTION(halve_step_scratch, int64_t, const model_t *, const cache_t *),
        FUNCTION(halve_step_check, const char *, const model_t *, const cache_t *),
        FUNCTION(halve_step, int, const model_t *, const cache_t *, const int64_t *, const int64_t *, float *, void *),
        {0},
    };
    return table;
}
