#include "bindings.h"
#include "sampling.h"
#include "threads.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

namespace harmonium {

namespace {

using Ids = std::optional<In<std::int32_t, 1>>;

// A row's wishes with the arrays they point to, which live as long as this object.
struct BoundRow {
  SampleRow spec;
  Ids prompt_ids, answer_ids, answer_counts, bias_ids;
  std::optional<In<float, 1>> bias;
  std::optional<In<std::uint32_t, 1>> allowed;

  BoundRow(std::int64_t row, std::uint64_t key, double temperature, std::int64_t top_k, double top_p, double min_p,
           double presence_penalty, double frequency_penalty, double repetition_penalty, int num_top, Ids prompt,
           Ids answer, Ids counts, Ids biased, std::optional<In<float, 1>> bias_values,
           std::optional<In<std::uint32_t, 1>> mask)
      : prompt_ids(std::move(prompt)), answer_ids(std::move(answer)), answer_counts(std::move(counts)),
        bias_ids(std::move(biased)), bias(std::move(bias_values)), allowed(std::move(mask)) {
    require(temperature >= 0, "temperature is " + std::to_string(temperature) + "; expected at least 0");
    require(top_k >= 0, "top_k is " + std::to_string(top_k) + "; expected at least 0");
    require(top_p > 0 && top_p <= 1, "top_p is " + std::to_string(top_p) + "; expected (0, 1]");
    require(min_p >= 0 && min_p <= 1, "min_p is " + std::to_string(min_p) + "; expected [0, 1]");
    require(repetition_penalty > 0, "repetition_penalty is not above 0");
    require(answer_ids.has_value() == answer_counts.has_value(), "answer_ids and answer_counts come together");
    require(!answer_ids || answer_ids->size() == answer_counts->size(), "answer_ids and answer_counts differ in length");
    require(bias_ids.has_value() == bias.has_value(), "bias_ids and bias come together");
    require(!bias_ids || bias_ids->size() == bias->size(), "bias_ids and bias differ in length");
    spec = {row, key, temperature, top_k, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty,
            num_top};
    if (prompt_ids) spec.prompt_ids = prompt_ids->data(), spec.num_prompt_ids = prompt_ids->size();
    if (answer_ids) {
      spec.answer_ids = answer_ids->data(), spec.num_answer_ids = answer_ids->size();
      spec.answer_counts = answer_counts->data();
    }
    if (bias_ids) spec.bias_ids = bias_ids->data(), spec.bias = bias->data(), spec.num_bias = bias->size();
    if (allowed) spec.allowed = allowed->data();
  }
};

void check_ids(const char* name, const std::int32_t* ids, std::int64_t count, std::int64_t vocabulary) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= vocabulary) {
      throw nb::value_error((std::string(name) + " holds token " + std::to_string(ids[i]) + "; the vocabulary has " +
                             std::to_string(vocabulary)).c_str());
    }
  }
}

void check_row(const BoundRow& row, std::int64_t num_rows, std::int64_t vocabulary, int max_top) {
  const SampleRow& spec = row.spec;
  require(spec.row >= 0 && spec.row < num_rows,
          "row is " + std::to_string(spec.row) + "; there are " + std::to_string(num_rows));
  require(spec.num_top <= max_top,
          "num_top is " + std::to_string(spec.num_top) + "; there is room for " + std::to_string(max_top));
  check_ids("prompt_ids", spec.prompt_ids, spec.num_prompt_ids, vocabulary);
  check_ids("answer_ids", spec.answer_ids, spec.num_answer_ids, vocabulary);
  check_ids("bias_ids", spec.bias_ids, spec.num_bias, vocabulary);
  const std::int64_t words = (vocabulary + 31) / 32;
  require(!row.allowed || static_cast<std::int64_t>(row.allowed->size()) >= words,
          "allowed has too few words; expected " + std::to_string(words));
}

void sample(In<float, 2> logits, const std::vector<BoundRow*>& rows, Out<std::int32_t, 1> status,
            Out<std::int32_t, 1> token_id, Out<float, 1> logprob, Out<std::int32_t, 2> top_id,
            Out<float, 2> top_logprob) {
  const std::size_t count = rows.size();
  const auto vocabulary = static_cast<std::int64_t>(logits.shape(1));
  const int max_top = static_cast<int>(top_id.shape(1));
  require(vocabulary >= 1 && vocabulary < (std::int64_t{1} << 31), "logits have no columns, or too many");
  require(status.shape(0) == count && token_id.shape(0) == count && logprob.shape(0) == count &&
              top_id.shape(0) == count && top_logprob.shape(0) == count && top_logprob.shape(1) == top_id.shape(1),
          "an output's shape does not fit the rows");
  for (const BoundRow* row : rows) check_row(*row, static_cast<std::int64_t>(logits.shape(0)), vocabulary, max_top);
  nb::gil_scoped_release release;
  parallel(static_cast<std::int64_t>(count), [&](std::int64_t i, int thread) {
    const SampleRow& spec = rows[i]->spec;
    static_assert(sizeof(SampleStatus) == sizeof(std::int32_t));
    const SampleOut out{reinterpret_cast<SampleStatus*>(status.data() + i), token_id.data() + i, logprob.data() + i,
                        top_id.data() + i * max_top, top_logprob.data() + i * max_top};
    sample_row(logits.data() + spec.row * vocabulary, vocabulary, spec, max_top, thread, out);
  });
}

}  // namespace

void bind_sampling(nb::module_& m) {
  nb::class_<BoundRow>(m, "SampleRow")
      .def(nb::init<std::int64_t, std::uint64_t, double, std::int64_t, double, double, double, double, double, int, Ids, Ids,
                    Ids, Ids, std::optional<In<float, 1>>, std::optional<In<std::uint32_t, 1>>>(),
           nb::arg("row"), nb::arg("key"), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"),
           nb::arg("min_p"), nb::arg("presence_penalty"), nb::arg("frequency_penalty"), nb::arg("repetition_penalty"),
           nb::arg("num_top"), nb::arg("prompt_ids").noconvert().none(), nb::arg("answer_ids").noconvert().none(),
           nb::arg("answer_counts").noconvert().none(), nb::arg("bias_ids").noconvert().none(),
           nb::arg("bias").noconvert().none(), nb::arg("allowed").noconvert().none());
  m.def("sampling_thread_bytes", &sampling_thread_bytes, nb::arg("vocabulary"));
  m.def("sample", &sample, nb::arg("logits").noconvert(), nb::arg("rows"), nb::arg("status").noconvert(),
        nb::arg("token_id").noconvert(), nb::arg("logprob").noconvert(), nb::arg("top_id").noconvert(),
        nb::arg("top_logprob").noconvert());
}

}  // namespace harmonium
