// Drawing an id of each stream from its logits, by a warp each, and telling the host of it.

namespace marlin {

constexpr int MAIL_SLOTS = 4, MAIL_WORDS = 2048, GAVE_UP = -1, NOT_FINITE = -2;

// How ids are drawn. Filters apply in the order temperature, top_k, top_p, min_p.
struct Drawing {
  const float* noise;      // [vocab], or null for the likeliest ids
  const uint32_t* barred;  // bits of ids that are not drawn, or null
  float temperature, top_p, min_p;
  int top_k;
};

// Where the ids of a launch go.
__device__ __forceinline__ int32_t* mail_of(const Stage& stage, int number) {
  return stage.mailbox + number % MAIL_SLOTS * MAIL_WORDS;
}

// Everything in the mailbox is there for the host that finds the number. For thread 0 of block 0, after the others.
__device__ __forceinline__ void post(const Machine& machine, int32_t* mail, int number, int ids) {
  if (machine.grid.failed()) {
    for (int i = 0; i < ids; i++) mail[1 + i] = GAVE_UP;
  }
  __threadfence_system();
  *static_cast<volatile int32_t*>(mail) = number;
}

// tell(stream, id, finite, cost) by one lane: whether logits are numbers, and where COSTS minus the logarithm of the probability
// that they give the id, whatever is barred.
template <bool COSTS, typename Tell>
__device__ __forceinline__ void draw_ids(Machine& machine, const Drawing& how, const Tell& tell) {
  constexpr int VOCAB = Job<LAST>::HEIGHT, SCORES = (VOCAB + 63) / 64;
  const Stage& stage = *machine.stage;
  const int lane = threadIdx.x % 32;
  for (int stream = threadIdx.x / 32; stream < STREAMS; stream += WARPS) {
    float scores[SCORES][2];  // of ids 2 * lane + 64 * n and the next one
    const float nothing = -marlin::infinity();
    if constexpr (TAGGED) {
      const Cell* cells[SCORES];
      bool there[SCORES];
      uint32_t bits[SCORES][2];
#pragma unroll
      for (int n = 0; n < SCORES; n++) {
        there[n] = 64 * n + 2 * lane < VOCAB, cells[n] = static_cast<const Cell*>(stage.logits) + stream * VOCAB + 64 * n + 2 * lane;
      }
      read_cells(machine.grid, cells, there, machine.phase, bits);
#pragma unroll
      for (int n = 0; n < SCORES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) scores[n][i] = there[n] ? __uint_as_float(bits[n][i]) : nothing;
      }
    } else {
      const float* logits = static_cast<const float*>(stage.logits) + stream * VOCAB;
#pragma unroll
      for (int n = 0; n < SCORES; n++) {  // loaded together, as each takes long
#pragma unroll
        for (int i = 0; i < 2; i++) scores[n][i] = 64 * n + 2 * lane + i < VOCAB ? __ldcg(logits + 64 * n + 2 * lane + i) : nothing;
      }
    }
    float highest = nothing, all = 0.0f;
    int id = VOCAB;
    bool finite = true, any = false;  // all below infinity, and some above minus that
#pragma unroll
    for (int n = 0; n < SCORES; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) finite = finite && scores[n][i] < -nothing, any = any || scores[n][i] > nothing;
    }
    finite = __all_sync(0xffffffff, finite) && __any_sync(0xffffffff, any);
    if constexpr (COSTS) {
      float peak = nothing;
#pragma unroll
      for (int n = 0; n < SCORES; n++) peak = fmaxf(peak, fmaxf(scores[n][0], scores[n][1]));
      peak = largest_of_warp(peak);
#pragma unroll
      for (int n = 0; n < SCORES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) all += expf(scores[n][i] - peak);
      }
      all = peak + logf(sum_of_warp(all));
    }
    float plain[SCORES][2];
#pragma unroll
    for (int n = 0; n < SCORES; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int place = 64 * n + 2 * lane + i;
        plain[n][i] = scores[n][i];
        if (how.barred != nullptr && place < VOCAB && (how.barred[place / 32] >> place % 32 & 1)) scores[n][i] = nothing;
      }
    }
    if (how.noise != nullptr) {
      float* scaled = reinterpret_cast<float*>(machine.memory) + stream * VOCAB;
#pragma unroll
      for (int n = 0; n < SCORES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          if (64 * n + 2 * lane + i < VOCAB) scaled[64 * n + 2 * lane + i] = scores[n][i] / how.temperature;
        }
      }
      __syncwarp();
      for (int i = lane; i < VOCAB; i += 32) highest = fmaxf(highest, scaled[i]);
      highest = largest_of_warp(highest);
      // What an order would tell, without one: how many are likelier than each, and how likely they are together.
      float total = 0.0f, lowest = nothing;
      if (0 < how.top_k && how.top_k < VOCAB) {
        lowest = -lowest;
        for (int i = lane; i < VOCAB; i += 32) {
          int likelier = 0;
          for (int j = 0; j < VOCAB; j++) likelier += scaled[j] > scaled[i];
          if (likelier < how.top_k) lowest = fminf(lowest, scaled[i]);
        }
        lowest = -largest_of_warp(-lowest);
      }
      if (how.top_p < 1.0f) {
        for (int i = lane; i < VOCAB; i += 32) total += scaled[i] < lowest ? 0.0f : expf(scaled[i] - highest);
        total = sum_of_warp(total);
        float inside = -nothing;
        for (int i = lane; i < VOCAB; i += 32) {
          if (scaled[i] < lowest) continue;
          float before = 0.0f;
          for (int j = 0; j < VOCAB; j++) before += scaled[j] > scaled[i] ? expf(scaled[j] - highest) : 0.0f;
          if (before / total < how.top_p) inside = fminf(inside, scaled[i]);
        }
        lowest = -largest_of_warp(-inside);
      }
      if (how.min_p > 0.0f) lowest = fmaxf(lowest, highest + logf(how.min_p));
      highest = nothing;
      for (int i = lane; i < VOCAB; i += 32) {
        const float score = scaled[i] < lowest ? nothing : scaled[i] + how.noise[i];
        if (id == VOCAB || score > highest) highest = score, id = i;
      }
    } else {
#pragma unroll
      for (int n = 0; n < SCORES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int other = 64 * n + 2 * lane + i;
          if (other < VOCAB && (id == VOCAB || scores[n][i] > highest)) highest = scores[n][i], id = other;
        }
      }
    }
    best_of_warp(highest, id);
    float own = nothing;  // the id's logit, which one lane has
    if constexpr (COSTS) {
#pragma unroll
      for (int n = 0; n < SCORES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) own = 64 * n + 2 * lane + i == id ? plain[n][i] : own;
      }
      own = largest_of_warp(own);
    }
    if (lane == 0) tell(stream, id, finite, finite ? all - own : 0.0f);
  }
}

}  // namespace marlin
